"""Reading pieces back: the bytes that are there, or the number of the piece that is damaged."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from magnetar.errors import ReleaseError
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import Metainfo, parse_metainfo
from magnetar.fetcher.torrent.piece_check import DamagedPieceError, PieceCheck

PIECE = 16_384
LENGTHS = {"release/a": 5 * PIECE + 100, "release/b": 300, "release/c": 3 * PIECE, "release/d": 7}


def content(path: str) -> bytes:
    return bytes((3 * at + 7 * (at >> 8) + ord(path[-1])) % 256 for at in range(LENGTHS[path]))


@pytest.fixture(scope="module")
def metainfo(tmp_path_factory: pytest.TempPathFactory) -> Metainfo:
    folder = tmp_path_factory.mktemp("made")
    (folder / "release").mkdir()
    for path in LENGTHS:
        (folder / path).write_bytes(content(path))
    return parse_metainfo(create_torrent(folder / "release", piece_length=PIECE))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "release").mkdir()
    for path in LENGTHS:
        (tmp_path / path).write_bytes(content(path))
    return tmp_path


@given(draws=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_gives_the_bytes_or_says_which_piece_is_damaged(
    metainfo: Metainfo, data: Path, draws: st.DataObject
) -> None:
    for path in LENGTHS:
        (data / path).write_bytes(content(path))
    path = draws.draw(st.sampled_from(sorted(LENGTHS)))
    offset = draws.draw(st.integers(0, LENGTHS[path]))
    count = draws.draw(st.integers(0, LENGTHS[path] - offset))
    hit = draws.draw(st.none() | st.sampled_from(sorted(LENGTHS)))
    damaged: int | None = None
    if hit is not None:
        at = draws.draw(st.integers(0, LENGTHS[hit] - 1))
        raw = bytearray(content(hit))
        raw[at] ^= 0x10
        (data / hit).write_bytes(raw)
        damaged = metainfo.pieces(metainfo.file(hit), at, 1)[0]
    check = PieceCheck(metainfo, data, wanted=LENGTHS)
    buffer = bytearray(count)
    if damaged in metainfo.pieces(metainfo.file(path), offset, count):
        with pytest.raises(DamagedPieceError) as caught:
            check.read_into(metainfo.file(path), offset, memoryview(buffer))
        assert caught.value.piece == damaged
    else:
        check.read_into(metainfo.file(path), offset, memoryview(buffer))
        assert buffer == content(path)[offset : offset + count]
    right = [check.is_right(piece) for piece in range(metainfo.num_pieces)]
    assert [piece for piece, is_right in enumerate(right) if not is_right] == (
        [] if damaged is None else [damaged]
    )


def test_a_piece_that_reaches_into_an_unwanted_file_is_read_unchecked(
    metainfo: Metainfo, data: Path
) -> None:
    (data / "release/b").unlink()
    wanted = set(LENGTHS) - {"release/b"}
    check = PieceCheck(metainfo, data, wanted=wanted)
    buffer = bytearray(LENGTHS["release/a"])
    check.read_into(metainfo.file("release/a"), 0, memoryview(buffer))
    assert buffer == content("release/a")
    assert check.hashed_bytes == 5 * PIECE


def test_threads_that_meet_within_pieces_read_each_of_them_once(
    metainfo: Metainfo, data: Path
) -> None:
    check = PieceCheck(metainfo, data, wanted=LENGTHS)
    file, size = metainfo.file("release/a"), 1000

    def read(offset: int) -> bytes:
        buffer = bytearray(min(size, file.length - offset))
        check.read_into(file, offset, memoryview(buffer))
        return bytes(buffer)

    with ThreadPoolExecutor(8) as threads:
        parts = list(threads.map(read, range(0, file.length, size)))
    assert b"".join(parts) == content("release/a")
    assert check.hashed_bytes == 6 * PIECE


def test_a_file_that_ends_early_is_said(metainfo: Metainfo, data: Path) -> None:
    (data / "release/a").write_bytes(content("release/a")[: 2 * PIECE])
    check = PieceCheck(metainfo, data, wanted=LENGTHS)
    with pytest.raises(ReleaseError, match="ends at byte 32768"):
        check.read_into(metainfo.file("release/a"), 0, memoryview(bytearray(3 * PIECE)))
    assert not check.is_right(2)
