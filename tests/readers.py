"""Range readers for tests: over bytes in memory, and over a release that has not all arrived."""

from collections.abc import Mapping

from magnetar.errors import ReleaseError
from magnetar.fetcher.tensors import MissingRangeError, RangeReader


class MemoryReader:
    """A complete release in memory; `reads` remembers what was asked of it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)
        self.reads: list[tuple[str, int, int]] = []

    def files(self) -> Mapping[str, int]:
        return {name: len(raw) for name, raw in self._files.items()}

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        self.reads.append((file, offset, num_bytes))
        raw = self._files[file][offset : offset + num_bytes]
        if len(raw) != num_bytes:
            raise ReleaseError(f"{file} ends before byte {offset + num_bytes}")
        return raw


class ArrivingReader:
    """A release of which only those pieces can be read that were fetched before."""

    def __init__(self, complete: RangeReader, *, piece_bytes: int) -> None:
        self._complete = complete
        self._piece_bytes = piece_bytes
        self.pieces: set[tuple[str, int]] = set()

    def files(self) -> Mapping[str, int]:
        return self._complete.files()

    def read(self, file: str, offset: int, num_bytes: int) -> bytes:
        if not self._covering(file, offset, num_bytes) <= self.pieces:
            raise MissingRangeError(file, offset, num_bytes)
        return self._complete.read(file, offset, num_bytes)

    def fetch(self, missing: MissingRangeError) -> None:
        """Let the pieces of that range arrive."""
        self.pieces |= self._covering(missing.file, missing.offset, missing.num_bytes)

    def _covering(self, file: str, offset: int, num_bytes: int) -> set[tuple[str, int]]:
        last = max(offset, offset + num_bytes - 1)
        return {
            (file, piece)
            for piece in range(offset // self._piece_bytes, last // self._piece_bytes + 1)
        }
