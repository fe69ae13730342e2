"""Against a picture of every byte: which file and range it belongs to, and which piece it is in."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import ReleaseError
from magnetar.fetcher.piece_map import ByteRange, PieceMap, merged, ranges_of
from magnetar.fetcher.tensors import TensorEntry
from magnetar.fetcher.torrent.metainfo import Metainfo, TorrentFile

NAMES = ("a", "b", "c", "d")
sizes_ = st.lists(st.integers(0, 60), min_size=1, max_size=4).map(
    lambda sizes: dict(zip(NAMES, sizes, strict=False))
)


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[PieceMap, dict[str, int], list[ByteRange]]:
    sizes = draw(sizes_)
    piece_map = PieceMap.of_files(
        sizes, piece_length=draw(st.integers(1, 20)), aligned=draw(st.booleans())
    )
    ranges = []
    for name in draw(st.lists(st.sampled_from(sorted(sizes)), max_size=6)):
        offset = draw(st.integers(0, sizes[name]))
        ranges.append(ByteRange(name, offset, draw(st.integers(0, sizes[name] - offset))))
    return piece_map, sizes, ranges


def picture(piece_map: PieceMap, sizes: dict[str, int]) -> dict[tuple[str, int], int]:
    """(file, byte) -> piece, one byte at a time."""
    return {
        (name, at): piece_map.pieces_of(ByteRange(name, at, 1))[0]
        for name, size in sizes.items()
        for at in range(size)
    }


def bytes_of(ranges: Sequence[ByteRange]) -> set[tuple[str, int]]:
    return {(part.file, at) for part in ranges for at in range(part.offset, part.end)}


@given(laid_out())
def test_agrees_with_counting_bytes(case: tuple[PieceMap, dict[str, int], list[ByteRange]]) -> None:
    piece_map, sizes, ranges = case
    where, wanted = picture(piece_map, sizes), bytes_of(ranges)

    pieces = piece_map.pieces(ranges)

    assert pieces == {where[byte] for byte in wanted}
    assert piece_map.boundary_pieces(ranges) == {
        piece for byte, piece in where.items() if piece in pieces and byte not in wanted
    }
    assert piece_map.num_bytes(pieces) == sum(piece in pieces for piece in where.values())
    assert bytes_of(piece_map.readable(pieces)) == {
        byte for byte, piece in where.items() if piece in pieces
    }
    assert piece_map.num_pieces == 1 + max(where.values(), default=-1)


@given(sizes_, st.integers(1, 20))
def test_lays_files_end_to_end_or_each_at_a_piece(sizes: dict[str, int], piece_length: int) -> None:
    plain = PieceMap.of_files(sizes, piece_length=piece_length)
    aligned = PieceMap.of_files(sizes, piece_length=piece_length, aligned=True)
    bytes_before = 0
    for name, size in sizes.items():
        for at in range(size):
            assert plain.pieces_of(ByteRange(name, at, 1))[0] == bytes_before // piece_length
            bytes_before += 1
        if size:
            assert {piece for piece in aligned.file_pieces(name)}.isdisjoint(
                piece for other in sizes if other != name for piece in aligned.file_pieces(other)
            )


@given(laid_out())
def test_merging_changes_no_byte(case: tuple[PieceMap, dict[str, int], list[ByteRange]]) -> None:
    _, _, ranges = case

    found = merged(ranges)

    assert bytes_of(found) == bytes_of(ranges)
    assert sum(part.num_bytes for part in found) == len(bytes_of(ranges))
    assert all(
        one.file != other.file or one.end < other.offset for one, other in itertools.pairwise(found)
    )


@given(laid_out())
def test_head_and_tail_are_the_ends_of_each_file(
    case: tuple[PieceMap, dict[str, int], list[ByteRange]],
) -> None:
    piece_map, sizes, _ = case

    assert piece_map.head_and_tail(sizes) == {
        piece_map.pieces_of(ByteRange(name, at, 1))[0]
        for name, size in sizes.items()
        if size
        for at in (0, size - 1)
    }


def test_takes_the_layout_of_a_torrent_and_names_files_as_the_release_does() -> None:
    files = (
        TorrentFile(path="release/a", length=10, offset=0),
        TorrentFile(path="release/b", length=6, offset=16),
        TorrentFile(path="other", length=1, offset=32),
    )
    metainfo = Metainfo(
        info_hash="",
        info_hashes=(),
        name="release",
        files=files,
        piece_length=8,
        num_pieces=5,
        total_bytes=17,
        raw=b"",
    )
    piece_map = PieceMap.of_torrent(metainfo, root="release/")

    assert list(piece_map.file_pieces("b")) == [2]
    assert piece_map.num_bytes([1, 2, 3, 4]) == 2 + 6 + 0 + 1
    assert piece_map.boundary_pieces([ByteRange("a", 0, 10)]) == set()


def test_tied_tensors_count_once() -> None:
    entry = TensorEntry(name="x", source_name="x", file="a", offset=4, dtype="fp32", shape=(2,))

    assert ranges_of([entry, entry]) == (ByteRange("a", 4, 8),)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (ByteRange("b", 0, 1), "no file b"),
        (ByteRange("a", 9, 2), "ends at byte 10"),
        (ByteRange("a", -1, 2), "ends at byte 10"),
    ],
)
def test_refuses_ranges_that_the_release_does_not_have(part: ByteRange, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        PieceMap.of_files({"a": 10}, piece_length=4).pieces([part])
