"""Tensors into the safetensors shards of a Hugging Face release, with little of them in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ShardWriter:
    """Writes tensors in the order in which they come; a shard ends where it would grow too large.

    `finish` gives the files their names: how many there are is known only then.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int) -> None:
        """A tensor larger than `max_shard_bytes` gets a shard of its own."""
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the tensor, which must not share memory with another; may write a shard."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self._max_shard_bytes:
            self._write()
        self._pending[name] = tensor
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes

    def finish(self) -> None:
        """Write what is left, name the shards and write their index."""
        if self._pending:
            self._write()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            shard = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write(self) -> None:
        from safetensors.torch import save_file

        path = self._folder / f"shard-{len(self._shards) + 1}.part"
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors gives a file to its owner alone
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0
