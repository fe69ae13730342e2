"""The bytes of tensors, checked while they are read into the memory in which they are used.

A tensor whose SHA-256 is known is checked against that, and any other against the hashes of its
torrent's pieces; its SHA-256 is then known for the next time.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..file_bytes import read_exactly
from ..manifest import Manifest
from ..piece_map import ByteRange
from ..tensors import TensorEntry
from ..torrent.metainfo import Metainfo
from ..torrent.piece_check import DamagedPieceError, PieceCheck


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadChecks:
    """What a node knows about the bytes of a release; data for another process."""

    data: Path
    """Where the files of the torrent lie, or the release folder itself."""
    root: str = ""
    """The release's folder in the torrent."""
    metainfo: Metainfo | None = None
    """None for a folder: then only what is in the manifest can be checked."""
    wanted: Collection[str] = ()
    """Files of the torrent that are there, at least in part."""
    manifest: Manifest


class DamagedError(Exception):
    """Bytes on the disk are not what they were; for whoever can fetch them again."""

    def __init__(self, part: ByteRange) -> None:
        super().__init__(f"{part.file} has other bytes at {part.offset} to {part.end} than it had")
        self.part = part


class CheckedFiles:
    """A `TensorFiles` that gives out no byte unchecked, as far as there is a check."""

    def __init__(self, checks: LoadChecks) -> None:
        self.found: dict[ByteRange, str] = {}
        """SHA-256 of tensors that were read, checked in another way and had none yet."""
        self._folder = checks.data / checks.root
        self._root = checks.root
        self._known = dict(checks.manifest.sums)
        self._metainfo = checks.metainfo
        self._pieces: PieceCheck | None = None
        if checks.metainfo is not None:
            pieces = PieceCheck(checks.metainfo, checks.data, wanted=checks.wanted)
            self._pieces = pieces if pieces.has_sums else None

    def read_into(self, entry: TensorEntry, buffer: memoryview) -> None:
        """Fills the buffer with the tensor's bytes.

        Raises:
            DamagedError: they are not right. ReleaseError: they cannot be read.
        """
        part = ByteRange(entry.file, entry.offset, entry.num_bytes)
        known = self._known.get(part)
        if known is None and self._pieces is not None and self._metainfo is not None:
            try:
                file = self._metainfo.file(self._root + entry.file)
                self._pieces.read_into(file, entry.offset, buffer)
            except DamagedPieceError as damage:
                raise DamagedError(part) from damage
        else:
            read_exactly(self._folder / entry.file, entry.offset, buffer)
        found = hashlib.sha256(buffer).hexdigest()
        if known is None:
            self._known[part] = self.found[part] = found
        elif found != known:
            raise DamagedError(part)

    def mended(self, part: ByteRange) -> None:
        """The pieces of these bytes were checked: where they can be, they alone count now."""
        if self._pieces is not None:
            self._known.pop(part, None)
