"""A model of the Llama architecture in a GGUF file: its facts, tensors and vocabulary.

Only the demo reads GGUF; releases that are served come in the layouts of `release`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import CheckpointError, PreflightError
from ..config import ModelConfig

if TYPE_CHECKING:
    import torch

_MATRICES: Final[Mapping[str, str]] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN: Final = 3
"""`tokenizer.ggml.token_type` of a token that text never spells."""


class LlamaGGUF:
    """One GGUF file of architecture ``llama``, dense, with the names of Hugging Face.

    The file stays mapped into memory as long as this object lives.
    """

    def __init__(self, path: Path) -> None:
        """Read the description; about 2.5 s for a vocabulary of 49152.

        Raises:
            PreflightError: the package ``gguf`` is not installed.
            CheckpointError: the file is no such model.
        """
        try:
            import gguf
        except ImportError as cause:
            raise PreflightError(
                "Reading the demo's weights needs the package gguf: pip install gguf"
            ) from cause
        self.path = path
        try:
            self._reader: Any = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as cause:
            raise CheckpointError(f"{path} cannot be read as GGUF ({cause}).") from cause
        if (architecture := self.field("general.architecture")) != "llama":
            raise CheckpointError(f"{path} holds a model of type {architecture!r}, not 'llama'.")
        self._stored: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.config = self._config()
        self._source_names = self._map_names()

    def field(self, name: str) -> Any:
        """The value of a metadata field: a number, a text, or a list.

        Raises:
            CheckpointError: there is no such field.
        """
        found = self._reader.get_field(name)
        if found is None:
            raise CheckpointError(f"{self.path} has no metadata field {name}.")
        return found.contents()

    @property
    def tokens(self) -> list[str]:
        """The vocabulary by id, in GPT-2's letters for bytes."""
        return list(self.field("tokenizer.ggml.tokens"))

    @property
    def merges(self) -> list[str]:
        """The merges of the vocabulary, first ones first; two pieces and a space each."""
        return list(self.field("tokenizer.ggml.merges"))

    @property
    def control_ids(self) -> list[int]:
        """The tokens that text never spells."""
        kinds = self.field("tokenizer.ggml.token_type")
        return [id for id, kind in enumerate(kinds) if kind == _CONTROL_TOKEN]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor by its Hugging Face name, in model order, with its row-major shape."""
        return {
            name: tuple(int(extent) for extent in reversed(self._stored[source].shape))
            for name, source in self._source_names.items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that Hugging Face name, dequantised to fp32, rotary rows half-split."""
        import torch
        from gguf import dequantize

        stored = self._stored[self._source_names[name]]
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        if name.endswith("q_proj.weight"):
            return split_rotary_rows(weight, self.config.n_heads)
        if name.endswith("k_proj.weight"):
            return split_rotary_rows(weight, self.config.n_kv_heads)
        return weight

    def _config(self) -> ModelConfig:
        n_heads = int(self.field("llama.attention.head_count"))
        dim = int(self.field("llama.embedding_length"))
        return ModelConfig(
            dim=dim,
            n_layers=int(self.field("llama.block_count")),
            head_dim=dim // n_heads,
            hidden_dim=int(self.field("llama.feed_forward_length")),
            n_heads=n_heads,
            n_kv_heads=int(self.field("llama.attention.head_count_kv")),
            norm_eps=_as_written(self.field("llama.attention.layer_norm_rms_epsilon")),
            vocab_size=int(self.field("llama.vocab_size")),
            rope_theta=_as_written(self.field("llama.rope.freq_base")),
            max_context_tokens=int(self.field("llama.context_length")),
            tie_embeddings="output.weight" not in self._stored,
        )

    def _map_names(self) -> dict[str, str]:
        """Hugging Face name -> name in the file, for exactly the tensors of the file."""
        names = {"model.embed_tokens.weight": "token_embd.weight"}
        for layer in range(self.config.n_layers):
            for source, name in _MATRICES.items():
                names[f"model.layers.{layer}.{name}.weight"] = f"blk.{layer}.{source}.weight"
        names["model.norm.weight"] = "output_norm.weight"
        if not self.config.tie_embeddings:
            names["lm_head.weight"] = "output.weight"
        missing = sorted(set(names.values()) - self._stored.keys())
        surplus = sorted(self._stored.keys() - set(names.values()))
        if missing or surplus:
            raise CheckpointError(
                f"{self.path} is no dense Llama: it lacks {len(missing)} tensors ({missing[:3]}) "
                f"and has {len(surplus)} that are not known ({surplus[:3]})."
            )
        return names


def split_rotary_rows(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k from pairs side by side (GGUF) to half-split order (Hugging Face).

    ``O`` is heads times head size, ``I`` the input size. The inverse of what the converter of
    llama.cpp does to the release's weights.
    """
    rows, columns = weight_OI.shape
    pairs_HP2I = weight_OI.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs_HP2I.transpose(1, 2).reshape(rows, columns)


def _as_written(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05 where the file has 9.99999975e-06."""
    if value == 0 or not math.isfinite(value):
        return float(value)
    return float(f"{value:.7g}")
