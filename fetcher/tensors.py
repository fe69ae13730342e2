"""Where every tensor of a release lies: name, file, byte range, dtype, shape.

Names are Mistral's own (``layers.3.feed_forward.experts.5.w1.weight``) whatever the layout of the
release; what must be done to the stored bytes is a property of the entry, applied on read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

StoredDtype = Literal["bf16", "fp16", "fp32"]
DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor: a contiguous byte range of one file of the release."""

    name: str
    """Canonical name."""
    source_name: str
    """Name inside the file."""
    file: str
    """Path relative to the release folder, with forward slashes."""
    offset: int
    """First byte inside the file."""
    dtype: StoredDtype
    shape: tuple[int, ...]
    """Of the tensor as it is read; row-major in the file unless it is transposed there."""
    rope_permuted_heads: int = 0
    """Heads whose rows the file holds in half-split rotary order (Hugging Face); 0: interleaved."""
    transposed: bool = False
    """The file holds the columns of this matrix one after the other."""

    @property
    def num_bytes(self) -> int:
        """Length of the byte range."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorIndex:
    """All tensors of a release by canonical name, in model order."""

    entries: Mapping[str, TensorEntry]

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def layer(self, layer: int) -> tuple[TensorEntry, ...]:
        """The tensors of one transformer layer (global id)."""
        prefix = f"layers.{layer}."
        return tuple(entry for entry in self if entry.name.startswith(prefix))


class RangeReader(Protocol):
    """Bytes of a release's files, some of which may not have arrived yet."""

    def files(self) -> Mapping[str, int]:
        """Every file of the release with its full size in bytes."""
        ...

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """Exactly those bytes, verified.

        Raises:
            MissingRangeError: part of the range has not arrived; fetch it and try again.
            ReleaseError: the file does not exist or ends before the range does.
        """
        ...


class MissingRangeError(Exception):
    """A range that has not arrived yet; raised to the fetcher, never to a user."""

    def __init__(self, file: str, offset: int, num_bytes: int) -> None:
        super().__init__(f"{file}: bytes {offset}..{offset + num_bytes} have not arrived")
        self.file = file
        self.offset = offset
        self.num_bytes = num_bytes


class TensorSource(Protocol):
    """Tensors of a release by canonical name, in canonical orientation and row order."""

    @property
    def index(self) -> TensorIndex:
        """What there is."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, freshly allocated; blocks on the disk.

        Raises:
            CheckpointError: the name is unknown or its bytes cannot be read.
        """
        ...
