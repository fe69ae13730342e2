"""Reading pieces back from the files of a torrent, and whether they still have their hashes."""

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from pathlib import Path

from ...errors import ReleaseError
from ..file_bytes import read_exactly
from .bencode import decode
from .metainfo import Metainfo, TorrentFile

SHA1_BYTES = 20
KEPT_BYTES = 64 << 20
"""Of whole pieces in memory, one at least: two tensors that touch seldom meet between pieces."""


class DamagedPieceError(Exception):
    """A piece on the disk has another hash; for whoever can fetch it again."""

    def __init__(self, piece: int) -> None:
        super().__init__(f"piece {piece} has another hash than the torrent's")
        self.piece = piece


class PieceCheck:
    """The files of a torrent in the store, read piece by piece against the SHA-1 sums of version 1.

    A torrent of version 2 alone has no such sums: then `has_sums` is False, and nothing is checked.
    Nor is a piece that reaches into a file that is not wanted, for the rest of it is nowhere.
    Any number of threads may read at once.
    """

    def __init__(self, metainfo: Metainfo, data: Path, *, wanted: Collection[str]) -> None:
        root = decode(metainfo.raw)
        assert isinstance(root, dict)
        info = root[b"info"]
        assert isinstance(info, dict)
        sums = info.get(b"pieces")
        self._sums = sums if isinstance(sums, bytes) else b""
        self._piece_length = metainfo.piece_length
        self._data = data
        self._wanted = frozenset(wanted)
        self._files = sorted(
            (file for file in metainfo.files if file.length), key=lambda file: file.offset
        )
        self._starts = [file.offset for file in self._files]
        last = self._files[-1]
        self._end = last.offset + last.length
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Future[bytes | None]] = OrderedDict()
        """Pieces that are being read, and the last ones that were right."""
        self._max_kept = max(1, KEPT_BYTES // metainfo.piece_length)
        self.hashed_bytes = 0

    @property
    def has_sums(self) -> bool:
        """Whether there is anything to check against."""
        return bool(self._sums)

    def read_into(self, file: TorrentFile, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with bytes of the file, each of them from a piece that is right.

        Raises:
            DamagedPieceError: one is not. ReleaseError: the file cannot be read, or has ended.
        """
        start = file.offset + offset
        end = start + len(buffer)
        at = start
        while at < end:
            piece = at // self._piece_length
            low, high = self._span(piece)
            stop = min(high, end)
            part = buffer[at - start : stop - start]
            if at == low and stop == high:
                self._pread(file, at - file.offset, part)
                self._check(piece, part)
            elif (whole := self._whole(piece)) is not None:
                part[:] = whole[at - low : stop - low]
            else:
                self._pread(file, at - file.offset, part)
            at = stop

    def is_right(self, piece: int) -> bool:
        """Whether the piece that is on the disk now has its hash, as far as that can be known."""
        return self.look_at(piece) is not False

    def look_at(self, piece: int) -> bool | None:
        """Whether the piece that is on the disk now has its hash; None where nobody can know."""
        self._forget(piece)
        try:
            return None if self._whole(piece) is None else True
        except (DamagedPieceError, ReleaseError):
            return False

    def _whole(self, piece: int) -> bytes | None:
        """The bytes of a piece; None where some of them are in no file of ours."""
        with self._lock:
            known = self._kept.get(piece)
            mine = self._kept.setdefault(piece, Future())
            self._kept.move_to_end(piece)
            if len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        if known is not None:
            return known.result()
        try:
            mine.set_result(self._read_whole(piece))
        except BaseException as error:
            self._forget(piece)
            mine.set_exception(error)
        return mine.result()

    def _forget(self, piece: int) -> None:
        with self._lock:
            self._kept.pop(piece, None)

    def _read_whole(self, piece: int) -> bytes | None:
        if not self._sums or any(file.path not in self._wanted for file in self._files_of(piece)):
            return None
        low, high = self._span(piece)
        data = bytearray(high - low)  # Zeros where hybrid torrents have padding.
        for file in self._files_of(piece):
            first, last = max(low, file.offset), min(high, file.offset + file.length)
            part = memoryview(data)[first - low : last - low]
            self._pread(file, first - file.offset, part)
        self._check(piece, data)
        return bytes(data)

    def _check(self, piece: int, data: "memoryview | bytearray") -> None:
        if not self._sums:
            return
        with self._lock:
            self.hashed_bytes += len(data)
        expected = self._sums[piece * SHA1_BYTES : (piece + 1) * SHA1_BYTES]
        if hashlib.sha1(data).digest() != expected:
            raise DamagedPieceError(piece)

    def _span(self, piece: int) -> tuple[int, int]:
        low = piece * self._piece_length
        return low, min(low + self._piece_length, self._end)

    def _files_of(self, piece: int) -> Iterator[TorrentFile]:
        low, high = self._span(piece)
        for at in range(max(0, bisect_right(self._starts, low) - 1), len(self._files)):
            file = self._files[at]
            if file.offset >= high:
                return
            if file.offset + file.length > low:
                yield file

    def _pread(self, file: TorrentFile, offset: int, buffer: memoryview) -> None:
        read_exactly(self._data / file.path, offset, buffer)
