"""Reading a release while it is still arriving: only bytes of verified, flushed pieces."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import ReleaseError
from ..tensors import MissingRangeError
from .metainfo import Metainfo, TorrentFile

MAX_READ_BYTES = 1 << 30


class PieceReader:
    """A `RangeReader` over the files of a partial download.

    A hole of a sparse file reads as zeros, so a file's size says nothing about its content: what
    may be read is only what `mark_readable` named. File names are relative to the release's root.
    """

    def __init__(self, *, metainfo: Metainfo, data: Path, root: str, wanted: Iterable[str]) -> None:
        self._metainfo = metainfo
        self._data = data
        self._files = {path.removeprefix(root): metainfo.file(path) for path in wanted}
        self._readable: set[int] = set()

    def mark_readable(self, pieces: Iterable[int]) -> None:
        """These pieces have the right hash and are in the files, not in a write queue."""
        self._readable = set(pieces)

    def file(self, name: str) -> TorrentFile:
        """The torrent's file behind a name of the release, or ReleaseError."""
        try:
            return self._files[name]
        except KeyError:
            raise ReleaseError(f"the release has no file {name}") from None

    def files(self) -> Mapping[str, int]:
        """Every wanted file with its full size in bytes."""
        return {name: file.length for name, file in self._files.items()}

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        """See `RangeReader.read`."""
        if num_bytes > MAX_READ_BYTES:
            raise ReleaseError(f"{file}: a read of {num_bytes} bytes, more than {MAX_READ_BYTES}")
        entry = self.file(file)
        if not self._readable.issuperset(self._metainfo.pieces(entry, offset, num_bytes)):
            raise MissingRangeError(file, offset, num_bytes)
        path = self._data / entry.path
        try:
            with path.open("rb") as opened:
                data = os.pread(opened.fileno(), num_bytes, offset)
        except OSError as error:
            raise ReleaseError(f"{path} cannot be read ({error.strerror}): run it again") from error
        if len(data) != num_bytes:
            raise ReleaseError(
                f"{path} ends before byte {offset + num_bytes}; somebody changed it: run it again"
            )
        return data
