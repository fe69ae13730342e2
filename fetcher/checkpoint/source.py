"""Tensors read from the files of a release, or of the verified part of one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from ...errors import CheckpointError, ReleaseError
from ..file_bytes import read_exactly
from ..piece_map import ByteRange, merged
from ..tensors import TensorEntry, TensorIndex

if TYPE_CHECKING:
    import torch


class TensorFiles(Protocol):
    """Another way to read the bytes of a tensor than straight from its file."""

    def read_into(self, entry: TensorEntry, buffer: memoryview) -> None:
        """Fills the buffer, which is as long as the entry's range. ReleaseError where it cannot."""
        ...


class FileTensorSource:
    """A `TensorSource` over a release folder.

    Where only a part of it was downloaded, `verified` names that part, and nothing else is read: a
    hole of a sparse file would come out as zeros. None: the files are complete and verified.
    It holds no file open and no bytes, so any number of threads may read from it.
    """

    def __init__(
        self,
        folder: Path,
        index: TensorIndex,
        *,
        verified: Iterable[ByteRange] | None = None,
        files: TensorFiles | None = None,
    ) -> None:
        self._folder = folder
        self._files = files
        self._index = index
        self._verified = None if verified is None else merged(verified)

    @property
    def index(self) -> TensorIndex:
        """What there is."""
        return self._index

    def allow(self, ranges: Iterable[ByteRange]) -> None:
        """These bytes have arrived and were verified, besides what `verified` named."""
        if self._verified is not None:
            self._verified = merged((*self._verified, *ranges))

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, freshly allocated; blocks on the disk.

        Rows that the file holds in half-split rotary order come out interleaved, and what it holds
        transposed comes out upright.

        Raises:
            CheckpointError: the name is unknown, its bytes cannot be read, or not all of them were
                downloaded and verified.
        """
        import torch

        if name not in self._index:
            raise CheckpointError(f"The release has no tensor {name!r}; it has {len(self._index)}.")
        entry = self._index[name]
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[entry.dtype]
        shape = entry.shape[::-1] if entry.transposed else entry.shape
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            self._read_into(entry, tensor.view(-1).view(torch.uint8).numpy().data)
        if entry.transposed:
            return tensor.t().contiguous()
        if entry.rope_permuted_heads:
            return interleave_rotary_rows(tensor, entry.rope_permuted_heads)
        return tensor

    def _refuse_unverified(self, entry: TensorEntry) -> None:
        end = entry.offset + entry.num_bytes
        if self._verified is not None and not any(
            part.file == entry.file and part.offset <= entry.offset and end <= part.end
            for part in self._verified
        ):
            raise CheckpointError(
                f"{entry.name} was not downloaded to this node as a whole (bytes {entry.offset} to "
                f"{end} of {entry.file}): fetch the release again, or with --full."
            )

    def _read_into(self, entry: TensorEntry, buffer: memoryview) -> None:
        self._refuse_unverified(entry)
        relative = PurePosixPath(entry.file)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{entry.name} points outside the release: {entry.file!r}.")
        try:
            if self._files is not None:
                self._files.read_into(entry, buffer)
            else:
                read_exactly(self._folder / relative, entry.offset, buffer)
        except ReleaseError as cause:
            raise CheckpointError(f"{entry.name}: {cause}") from cause


def interleave_rotary_rows(weight_OI: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k from half-split order (Hugging Face) to pairs side by side (the release).

    ``O`` is heads times head size, ``I`` the input size. The inverse of what the converters of
    transformers do to the release's weights.
    """
    rows, columns = weight_OI.shape
    halves_H2PI = weight_OI.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves_H2PI.transpose(1, 2).reshape(rows, columns)
