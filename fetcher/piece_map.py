"""Which bytes and which pieces of a torrent hold given tensors.

Pieces cut the space in which the files of a torrent lie end to end; version 2 and hybrid torrents
start every file at a piece of its own, with padding that nobody sends (BEP 52). A piece has one
hash, so that a tensor needs every piece it touches, whole. Pure: no disk, no network.
"""

import bisect
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..errors import ReleaseError
from .tensors import TensorEntry
from .torrent.metainfo import Metainfo


@dataclass(frozen=True, order=True, slots=True)
class ByteRange:
    """Consecutive bytes of one file, named as in the release."""

    file: str
    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.offset + self.num_bytes


def merged(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """The same bytes in the fewest ranges, by file and offset; empty ranges are gone."""
    found: list[ByteRange] = []
    for part in sorted(ranges):
        if not part.num_bytes:
            continue
        last = found[-1] if found else None
        if last is not None and last.file == part.file and part.offset <= last.end:
            end = max(last.end, part.end)
            found[-1] = ByteRange(last.file, last.offset, end - last.offset)
        else:
            found.append(part)
    return tuple(found)


def ranges_of(entries: Iterable[TensorEntry]) -> tuple[ByteRange, ...]:
    """The bytes of these tensors, merged; those that share bytes (tied ones) count once."""
    return merged(ByteRange(entry.file, entry.offset, entry.num_bytes) for entry in entries)


class PieceMap:
    """The files of a release in the space that the pieces divide."""

    def __init__(self, files: Mapping[str, tuple[int, int]], *, piece_length: int) -> None:
        """`files` is name -> (first byte in the space, length), of all files of the torrent."""
        self.piece_length = piece_length
        self._files = dict(files)
        filled = sorted((start, length) for start, length in files.values() if length)
        self._starts = [start for start, _ in filled]
        self._lengths = [length for _, length in filled]
        space = max((start + length for start, length in filled), default=0)
        self.num_pieces = -(-space // piece_length)

    @classmethod
    def of_torrent(cls, metainfo: Metainfo, *, root: str = "") -> "PieceMap":
        """`root` is the release's folder in the torrent; other files keep their paths."""
        return cls(
            {file.path.removeprefix(root): (file.offset, file.length) for file in metainfo.files},
            piece_length=metainfo.piece_length,
        )

    @classmethod
    def of_files(
        cls, sizes: Mapping[str, int], *, piece_length: int, aligned: bool = False
    ) -> "PieceMap":
        """Of a torrent that somebody would make of these files, by name.

        `aligned` as version 2 and hybrid torrents do: each file begins with a piece.
        """
        files: dict[str, tuple[int, int]] = {}
        start = 0
        for name in sorted(sizes):
            files[name] = (start, sizes[name])
            start += sizes[name]
            if aligned:
                start = -(-start // piece_length) * piece_length
        return cls(files, piece_length=piece_length)

    def pieces_of(self, part: ByteRange) -> range:
        """The pieces that hold these bytes.

        Raises:
            ReleaseError: there is no such file, or it ends before the range does.
        """
        start = self._start(part)
        if not part.num_bytes:
            return range(0)
        last = start + part.num_bytes - 1
        return range(start // self.piece_length, last // self.piece_length + 1)

    def pieces(self, ranges: Iterable[ByteRange]) -> frozenset[int]:
        """The pieces that hold any of these bytes. Raises what `pieces_of` raises."""
        return frozenset(piece for part in ranges for piece in self.pieces_of(part))

    def file_pieces(self, name: str) -> range:
        """The pieces of a whole file. Raises what `pieces_of` raises."""
        return self.pieces_of(ByteRange(name, 0, self.length(name)))

    def head_and_tail(self, names: Iterable[str]) -> frozenset[int]:
        """The first and the last piece of each file: headers and directories are there."""
        found = [self.file_pieces(name) for name in names]
        return frozenset(piece for pieces in found if pieces for piece in (pieces[0], pieces[-1]))

    def boundary_pieces(self, ranges: Iterable[ByteRange]) -> frozenset[int]:
        """Those of `pieces` that hold other bytes too: what is fetched beyond what is needed."""
        held: Counter[int] = Counter()
        for part in merged(ranges):
            start = self._start(part)
            pieces = self.pieces_of(part)
            # Pieces between the first and the last of a range are full of it.
            for piece in {pieces[0], pieces[-1]}:
                low = max(start, piece * self.piece_length)
                high = min(start + part.num_bytes, (piece + 1) * self.piece_length)
                held[piece] += high - low
        return frozenset(piece for piece, count in held.items() if count < self._payload(piece))

    def num_bytes(self, pieces: Iterable[int]) -> int:
        """Bytes of files in these pieces, without padding: what a peer sends of them."""
        return sum(map(self._payload, pieces))

    def length(self, name: str) -> int:
        """Size of a file. Raises ReleaseError when there is none of that name."""
        try:
            return self._files[name][1]
        except KeyError:
            raise ReleaseError(f"the release has no file {name}") from None

    def readable(self, pieces: Collection[int]) -> tuple[ByteRange, ...]:
        """Every byte that lies in these pieces, merged."""
        runs = _runs(pieces)
        found = []
        for name, (start, length) in self._files.items():
            for first, end in runs:
                low = max(start, first * self.piece_length)
                high = min(start + length, end * self.piece_length)
                if low < high:
                    found.append(ByteRange(name, low - start, high - low))
        return merged(found)

    def _start(self, part: ByteRange) -> int:
        length = self.length(part.file)
        if part.offset < 0 or part.num_bytes < 0 or part.end > length:
            raise ReleaseError(
                f"{part.file} ends at byte {length}, before {part.offset}+{part.num_bytes}: "
                "the release is truncated"
            )
        return self._files[part.file][0] + part.offset

    def _payload(self, piece: int) -> int:
        low, high = piece * self.piece_length, (piece + 1) * self.piece_length
        count = 0
        at = max(0, bisect.bisect_right(self._starts, low) - 1)
        while at < len(self._starts) and self._starts[at] < high:
            end = min(high, self._starts[at] + self._lengths[at])
            count += max(0, end - max(low, self._starts[at]))
            at += 1
        return count


def _runs(pieces: Collection[int]) -> list[tuple[int, int]]:
    """First and end of every run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for piece in sorted(pieces):
        if runs and runs[-1][1] == piece:
            runs[-1] = (runs[-1][0], piece + 1)
        else:
            runs.append((piece, piece + 1))
    return runs
