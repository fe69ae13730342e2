import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.record import Fingerprint, Record
from magnetar.fetcher.torrent.metainfo import Metainfo, TorrentFile
from magnetar.fetcher.torrent.remains import GRACE_NS, Remains, Run, data_runs, survey

BLOCK = 16_384
PIECE = 2 * BLOCK
SECOND = 1_000_000_000
NOW = 1_000 * SECOND
BOOT = "this boot"


def torrent(*lengths: int, piece_length: int = PIECE, gap: int = 0) -> Metainfo:
    """Files f0, f1, ... with `gap` bytes of padding between them."""
    files, offset = [], 0
    for number, length in enumerate(lengths):
        files.append(TorrentFile(path=f"f{number}", length=length, offset=offset))
        offset += length + gap
    space = files[-1].offset + files[-1].length
    return Metainfo(
        info_hash="a" * 40,
        info_hashes=("a" * 40,),
        name="t",
        files=tuple(files),
        piece_length=piece_length,
        num_pieces=-(-space // piece_length),
        total_bytes=sum(lengths),
        raw=b"",
    )


TWO_FILES = torrent(4 * PIECE, 4 * PIECE)
"""Pieces 0..3 are those of f0, 4..7 those of f1."""
AS_RECORDED = {
    "f0": Fingerprint(size=4 * PIECE, mtime_ns=NOW - 5 * SECOND),
    "f1": Fingerprint(size=2 * PIECE, mtime_ns=NOW - SECOND),
}
WRITING = Record(
    pieces=frozenset({0, 1, 4}),
    files=AS_RECORDED,
    is_writing=True,
    boot=BOOT,
    synced=frozenset({0}),
)
CLEAN = replace(WRITING, is_writing=False)


def look(
    record: Record,
    now: Mapping[str, Fingerprint],
    *,
    boot: str = BOOT,
    runs: Mapping[str, Iterable[Run]] | None = None,
) -> Remains:
    return survey(
        TWO_FILES,
        ("f0", "f1"),
        record,
        now,
        recorded_ns=NOW,
        boot=boot,
        data_runs=lambda path: (runs or {}).get(path, [(0, now[path].size)]),
    )


def later(mtime_ns: int, *, size: int = 2 * PIECE) -> Mapping[str, Fingerprint]:
    return {**AS_RECORDED, "f1": Fingerprint(size=size, mtime_ns=mtime_ns)}


def test_nothing_is_hashed_while_nothing_has_changed() -> None:
    remains = look(CLEAN, AS_RECORDED)
    assert remains.known == {0, 1, 4}
    assert remains.found == {}
    assert remains.begun == frozenset(range(8))


def test_after_a_kill_only_pieces_that_are_not_on_record_and_have_data_are_hashed() -> None:
    # One more piece, and one block of the next, were written after the record.
    written = 2 * PIECE + BLOCK
    remains = look(
        WRITING,
        later(NOW + SECOND, size=written),
        runs={"f0": [(0, 2 * PIECE)], "f1": [(0, written)]},
    )
    assert remains.known == {0, 1, 4}
    assert remains.whole == {5}
    assert remains.found == {5: (True, True), 6: (True, False)}


@pytest.mark.parametrize(
    "mtime_ns",
    [NOW + GRACE_NS + 1, NOW + 10**6 * SECOND, NOW - 2 * SECOND, 0],
    ids=["later than our last write", "in the future", "before the record", "in 1970"],
)
def test_a_file_that_another_changed_has_its_own_pieces_hashed(mtime_ns: int) -> None:
    remains = look(WRITING, later(mtime_ns), runs={"f0": [(0, 2 * PIECE)], "f1": [(0, 2 * PIECE)]})
    assert remains.known == {0, 1}
    assert remains.whole == {4, 5}


def test_a_change_after_a_proper_end_is_never_taken_for_our_own() -> None:
    remains = look(CLEAN, later(NOW + 1))
    assert remains.known == {0, 1}
    assert remains.whole == {4, 5}
    assert remains.begun == {0, 1, 2, 3}


def test_a_file_that_shrank_or_is_gone_is_not_believed() -> None:
    assert look(WRITING, later(NOW, size=PIECE)).known == {0, 1}
    gone = look(WRITING, {"f0": AS_RECORDED["f0"]})
    assert gone.known == {0, 1}
    assert not any(piece >= 4 for piece in gone.found)


def test_after_a_power_cut_only_what_was_synced_counts_unread() -> None:
    for record, now in ((CLEAN, AS_RECORDED), (WRITING, later(NOW - 9 * SECOND, size=PIECE))):
        remains = look(record, now, boot="the next boot")
        assert remains.known == {0}
        assert {1, 4} <= remains.whole


def test_a_piece_that_two_files_share_needs_both() -> None:
    shared = torrent(PIECE + 100, PIECE)
    now = {"f0": Fingerprint(size=PIECE + 100, mtime_ns=1), "f1": Fingerprint(size=5, mtime_ns=9)}
    record = Record(
        pieces=frozenset({0, 1, 2}), files={**now, "f1": Fingerprint(size=5, mtime_ns=1)}, boot=BOOT
    )
    remains = survey(
        shared,
        ("f0", "f1"),
        record,
        now,
        recorded_ns=NOW,
        boot=BOOT,
        data_runs=lambda path: [(0, now[path].size)],
    )
    assert remains.known == {0}
    assert remains.whole == frozenset()


UNIT = 4096
RUNS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda all_: sum(all_) > 0),
    gap=st.integers(0, 9),
    data=st.lists(RUNS, min_size=4, max_size=4),
    piece_blocks=st.integers(1, 4),
)
def test_found_blocks_are_those_of_which_every_byte_has_data(
    lengths: list[int], gap: int, data: list[list[tuple[int, int]]], piece_blocks: int
) -> None:
    metainfo = torrent(
        *(length * UNIT for length in lengths),
        piece_length=piece_blocks * BLOCK,
        gap=gap * UNIT,
    )
    space = max(file.offset + file.length for file in metainfo.files)
    there = [True] * (space // UNIT)  # What is in no file is padding.
    runs: dict[str, list[Run]] = {}
    for file, wanted_runs in zip(metainfo.files, data, strict=False):
        units: set[int] = set()
        for start, length in wanted_runs:
            units.update(range(start, start + length))
        first = file.offset // UNIT
        for unit in range(file.length // UNIT):
            there[first + unit] = unit in units
        runs[file.path] = [(unit * UNIT, unit * UNIT + UNIT) for unit in sorted(units)]
    names = [file.path for file in metainfo.files]
    now = {file.path: Fingerprint(size=file.length, mtime_ns=1) for file in metainfo.files}
    remains = survey(
        metainfo,
        names,
        Record(is_writing=True, boot=BOOT),
        now,
        recorded_ns=NOW,
        boot=BOOT,
        data_runs=lambda path: runs[path],
    )
    per_block = BLOCK // UNIT
    for piece in {piece for file in metainfo.files for piece in metainfo.pieces(file)}:
        low = piece * piece_blocks * per_block
        cuts = range(low, min(low + piece_blocks * per_block, len(there)), per_block)
        blocks = tuple(all(there[cut : min(cut + per_block, cuts.stop)]) for cut in cuts)
        assert remains.found.get(piece, (False,) * len(blocks)) == blocks


def test_holes_of_a_file_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"x" * (1 << 20))
        file.seek(8 << 20)
        file.write(b"x" * 100)
        file.truncate(16 << 20)
    covered: set[int] = set()
    for start, end in data_runs(path):
        covered.update(range(start // 4096, -(-end // 4096)))
    assert {0, 255, (8 << 20) // 4096} <= covered
    if os.stat(path).st_blocks * 512 < 2 << 20:
        assert (4 << 20) // 4096 not in covered
    assert list(data_runs(tmp_path / "none")) == []
