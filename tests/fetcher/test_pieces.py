from pathlib import Path

import pytest

from magnetar.errors import ReleaseError
from magnetar.fetcher.tensors import MissingRangeError
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.pieces import PieceReader

PIECE = 16_384
DATA = bytes(i * 7 % 251 for i in range(3 * PIECE))


@pytest.fixture
def reader(tmp_path: Path) -> PieceReader:
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "a").write_bytes(DATA)
    (folder / "b").write_bytes(DATA[:100])
    metainfo = parse_metainfo(create_torrent(folder, piece_length=PIECE))
    return PieceReader(metainfo=metainfo, data=tmp_path, root="release/", wanted=["release/a"])


def test_names_files_as_the_release_does(reader: PieceReader) -> None:
    assert reader.files() == {"a": len(DATA)}
    with pytest.raises(ReleaseError, match="no file b"):
        reader.read("b", 0, 1)


def test_reads_only_what_was_marked(reader: PieceReader) -> None:
    with pytest.raises(MissingRangeError):
        reader.read("a", 0, 1)
    reader.mark_readable([0, 2])
    assert reader.read("a", 10, 100) == DATA[10:110]
    assert reader.read("a", 2 * PIECE, PIECE) == DATA[2 * PIECE :]
    assert reader.read("a", PIECE, 0) == b""
    for offset, num_bytes in ((PIECE - 1, 2), (PIECE, 1), (2 * PIECE - 1, 2), (0, len(DATA))):
        with pytest.raises(MissingRangeError) as caught:
            reader.read("a", offset, num_bytes)
        assert (caught.value.file, caught.value.offset) == ("a", offset)
        assert caught.value.num_bytes == num_bytes


def test_a_range_past_the_end_or_a_truncated_file_is_an_error(
    reader: PieceReader, tmp_path: Path
) -> None:
    reader.mark_readable(range(4))
    with pytest.raises(ReleaseError, match="truncated"):
        reader.read("a", len(DATA) - 1, 2)
    (tmp_path / "release" / "a").write_bytes(DATA[:50])
    with pytest.raises(ReleaseError, match="somebody changed it"):
        reader.read("a", 0, 100)
    (tmp_path / "release" / "a").unlink()
    with pytest.raises(ReleaseError, match="cannot be read"):
        reader.read("a", 0, 100)
