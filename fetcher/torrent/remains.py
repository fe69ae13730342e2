"""What of a torrent lies on the disk after whatever ended the last run. Reads no contents.

While a download runs, the store's record is renewed about once a second. A process that is killed
leaves a record behind the files by what was written since. Those writes show: a file then has a
newer time, but none much newer than the record, and its holes say where nothing was written. So a
piece on record counts, and a piece that is not, but has data, is hashed. A file that changed in
another way has all its pieces hashed, and no other file's.

A machine that went down lost besides what its memory had not written to the disk yet. Then only
pieces count that were known to be there.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..record import Fingerprint, Record
from .merkle import BLOCK_BYTES
from .metainfo import Metainfo

GRACE_NS: Final = 10_000_000_000
"""How much later than the record our own last writes may be: records take long on a busy disk."""

Run = tuple[int, int]
"""First byte and the one after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Remains:
    """What need not be fetched, as far as is known without reading it."""

    known: frozenset[int]
    """Pieces that are in the files and have the right hashes."""
    found: Mapping[int, tuple[bool, ...]]
    """Of other pieces, which of their blocks may be in the files."""
    begun: frozenset[int]
    """Pieces on whose files nobody has written since resume data were made."""

    @property
    def whole(self) -> frozenset[int]:
        """Pieces that need only be hashed."""
        return frozenset(piece for piece, blocks in self.found.items() if all(blocks))


def survey(
    metainfo: Metainfo,
    wanted: Collection[str],
    record: Record,
    now: Mapping[str, Fingerprint],
    *,
    recorded_ns: int,
    boot: str,
    has_parts: bool = True,
    data_runs: Callable[[str], Iterable[Run]],
) -> Remains:
    """Judges every wanted file by its size and times; pure but for `data_runs`.

    `recorded_ns` is when the record was written, by the clock of the files. `has_parts`: what
    libtorrent keeps of pieces that reach into files that are not wanted is there. `data_runs` says
    where a file has data.
    """
    doubted: set[int] = set()
    unsure: set[int] = set()
    for file in metainfo.files:
        if file.path not in wanted:
            continue
        seen, is_known = now.get(file.path), record.files.get(file.path)
        if record.is_writing or seen is None or seen != is_known:
            unsure.update(metainfo.pieces(file))
        if seen is None or not _is_ours(seen, is_known, record, recorded_ns, boot):
            doubted.update(metainfo.pieces(file))
    lasting = record.lasting(boot)
    known = frozenset(lasting - doubted)
    unsure |= record.pieces - lasting
    return Remains(
        known=known,
        found=found_blocks(
            metainfo,
            wanted,
            unsure - known,
            kept_apart=record.pieces if has_parts else frozenset(),
            data_runs=lambda path: data_runs(path) if path in now else (),
        ),
        begun=frozenset(range(metainfo.num_pieces)) - unsure,
    )


def data_runs(path: Path) -> Iterator[Run]:
    """Where a file has data and not holes; all of it, where the file system has no holes."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        end = 0
        while True:
            try:
                start = os.lseek(file, end, os.SEEK_DATA)
            except OSError:
                return  # There is nothing more but a hole.
            end = os.lseek(file, start, os.SEEK_HOLE)
            yield start, end
    finally:
        os.close(file)


def boot_id() -> str:
    """Names the time since this machine was started; empty where nothing tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_ours(
    seen: Fingerprint, known: Fingerprint | None, record: Record, recorded_ns: int, boot: str
) -> bool:
    """Whether the run that left the record can have made this of the file."""
    if seen == known:
        return True
    if not record.is_writing or seen.mtime_ns > recorded_ns + GRACE_NS:
        return False
    if known is None or record.boot != boot:
        return True  # A machine that went down may have lost the last size and time as well.
    return seen.size >= known.size and seen.mtime_ns >= known.mtime_ns


def found_blocks(
    metainfo: Metainfo,
    wanted: Collection[str],
    pieces: Iterable[int],
    *,
    kept_apart: frozenset[int],
    data_runs: Callable[[str], Iterable[Run]],
) -> dict[int, tuple[bool, ...]]:
    """Which blocks of these pieces may be in the files; nothing of pieces without any.

    Of `kept_apart` pieces libtorrent has what lies in files that are not wanted.
    """
    runs = list(_joined(_file_runs(metainfo, wanted, kept_apart, data_runs)))
    starts = [start for start, _ in runs]

    def has_data(start: int, end: int) -> bool:
        at = bisect_right(starts, start) - 1
        return at >= 0 and runs[at][1] >= end

    found = {}
    space = max(file.offset + file.length for file in metainfo.files)
    for piece in sorted(pieces):
        low = piece * metainfo.piece_length
        high = min(low + metainfo.piece_length, space)
        cuts = range(low, high, BLOCK_BYTES)
        if has_data(low, high):
            found[piece] = (True,) * len(cuts)
        else:
            blocks = tuple(has_data(cut, min(cut + BLOCK_BYTES, high)) for cut in cuts)
            if any(blocks):
                found[piece] = blocks
    return found


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Runs in order; those that touch become one."""
    last: Run | None = None
    for run in runs:
        if last is not None and run[0] <= last[1]:
            last = last[0], max(last[1], run[1])
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _file_runs(
    metainfo: Metainfo,
    wanted: Collection[str],
    kept_apart: frozenset[int],
    data_runs: Callable[[str], Iterable[Run]],
) -> Iterator[Run]:
    """Where there is data in the space of the pieces, in order.

    What lies between files is padding, which everybody has.
    """
    end = 0
    for file in sorted(metainfo.files, key=lambda file: (file.offset, file.length)):
        if end < file.offset:
            yield end, file.offset
        end = file.offset + file.length
        if file.path not in wanted:
            for piece in sorted({*metainfo.pieces(file)} & kept_apart):
                low = piece * metainfo.piece_length
                yield max(low, file.offset), min(low + metainfo.piece_length, end)
        else:
            for start, stop in data_runs(file.path):
                if start < file.length:
                    yield file.offset + start, min(file.offset + stop, end)
