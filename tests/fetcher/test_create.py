"""Torrents that we make, against libtorrent's of the same folder and against hashing by hand."""

import hashlib
import tempfile
import threading
from pathlib import Path
from typing import Any, get_args

import libtorrent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.errors import InterruptedByUserError, NotFoundError, UsageError
from magnetar.fetcher.piece_map import ByteRange, PieceMap
from magnetar.fetcher.torrent.bencode import decode, encode
from magnetar.fetcher.torrent.create import create_torrent, listing
from magnetar.fetcher.torrent.formats import TorrentFormat
from magnetar.fetcher.torrent.metainfo import parse_metainfo

PIECE = 32_768
BLOCK = 16_384
FORMATS: tuple[TorrentFormat, ...] = get_args(TorrentFormat)
FLAGS = {
    "v1": libtorrent.create_torrent.v1_only,
    "v2": libtorrent.create_torrent.v2_only,
    "hybrid": 0,
}
sizes_ = st.one_of(
    st.sampled_from([0, 1, BLOCK, BLOCK + 1, PIECE, PIECE + 1, 2 * PIECE, 5 * PIECE - 1]),
    st.integers(0, 4 * PIECE),
)
names_ = st.sampled_from(["a", "a.b", "a-", "b", "sub/a", "sub/b", "sub/deep/c", "Z", "é"])
folders_ = st.dictionaries(names_, sizes_, min_size=2, max_size=6).filter(lambda f: any(f.values()))


def fill(folder: Path, files: dict[str, int]) -> Path:
    for name, size in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes((at * 7 + len(name)) % 251 for at in range(size)))
    return folder


@settings(max_examples=25)
@given(folders_)
def test_is_what_libtorrent_makes_of_the_same_folder(files: dict[str, int]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = fill(Path(parent, "release"), files)
        for kind in FORMATS:
            creator = libtorrent.create_torrent(
                libtorrent.list_files(str(folder)), PIECE, FLAGS[kind]
            )
            libtorrent.set_piece_hashes(creator, parent)
            theirs = decode(libtorrent.bencode(creator.generate()))
            ours = decode(create_torrent(folder, format=kind, piece_length=PIECE))
            assert isinstance(ours, dict)
            assert isinstance(theirs, dict)
            if kind == "v1":  # libtorrent lists them as the disk does.
                assert libtorrent.load_torrent_buffer(encode(ours)).ti is not None
                continue
            assert ours[b"info"] == theirs[b"info"]
            assert ours[b"piece layers"] == theirs[b"piece layers"]


def tree_hash(piece: bytes, *, num_blocks: int) -> bytes:
    """By the book: every layer padded to its full width."""
    nodes = [hashlib.sha256(piece[at : at + BLOCK]).digest() for at in range(0, len(piece), BLOCK)]
    nodes += [bytes(32)] * (num_blocks - len(nodes))
    while len(nodes) > 1:
        nodes = [hashlib.sha256(nodes[i] + nodes[i + 1]).digest() for i in range(0, len(nodes), 2)]
    return nodes[0]


@settings(max_examples=25)
@given(folders_, st.sampled_from(FORMATS))
def test_the_bytes_that_the_piece_map_names_have_the_hash_of_their_piece(
    files: dict[str, int], kind: TorrentFormat
) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = fill(Path(parent, "release"), files)
        raw = create_torrent(folder, format=kind, piece_length=PIECE)
        metainfo = parse_metainfo(raw)
        piece_map = PieceMap.of_torrent(metainfo, root="release/")
        root = decode(raw)
        assert isinstance(root, dict)
        info = root[b"info"]
        assert isinstance(info, dict)
        data = {name: (folder / name).read_bytes() for name in files}

        def held(piece: int) -> bytes:
            # As the files lie among the pieces, which their names need not.
            order = {file.path.removeprefix("release/"): file.offset for file in metainfo.files}
            parts = sorted(piece_map.readable([piece]), key=lambda part: order[part.file])
            return b"".join(data[part.file][part.offset : part.end] for part in parts)

        if kind != "v2":
            pieces = info[b"pieces"]
            assert isinstance(pieces, bytes)
            for piece in range(metainfo.num_pieces):
                padded = held(piece) if kind == "v1" else held(piece).ljust(PIECE, b"\0")
                assert hashlib.sha1(padded).digest() == pieces[20 * piece : 20 * piece + 20]
        if kind != "v1":
            layers, tree = root[b"piece layers"], info[b"file tree"]
            for name, content in data.items():
                entry: Any = tree
                for part in name.split("/"):
                    entry = entry[part.encode()]
                of_file = piece_map.file_pieces(name)
                assert b"".join(held(piece) for piece in of_file) == content
                assert piece_map.boundary_pieces([ByteRange(name, 0, len(content))]) == frozenset()
                if len(content) > PIECE:
                    hashes = b"".join(
                        tree_hash(held(piece), num_blocks=PIECE // BLOCK) for piece in of_file
                    )
                    assert isinstance(layers, dict)
                    assert layers[entry[b""][b"pieces root"]] == hashes
                elif content:
                    num_blocks = 1 if len(content) <= BLOCK else 2
                    assert entry[b""][b"pieces root"] == tree_hash(content, num_blocks=num_blocks)


def test_carries_what_others_need_and_nothing_else(tmp_path: Path) -> None:
    folder = fill(tmp_path / "release", {"a": 10, "b": 20})
    raw = create_torrent(
        folder,
        format="hybrid",
        trackers=["http://t.example/announce"],
        web_seeds=["http://w.example/files/"],
        private=True,
    )
    root, metainfo = decode(raw), parse_metainfo(raw)

    assert isinstance(root, dict)
    assert set(root) == {b"info", b"announce", b"announce-list", b"url-list", b"piece layers"}
    assert metainfo.is_private
    assert not parse_metainfo(create_torrent(folder)).is_private
    assert metainfo.trackers == ("http://t.example/announce",)
    assert metainfo.web_seeds == ("http://w.example/files/",)
    assert len(metainfo.info_hashes) == 2
    loaded = libtorrent.load_torrent_buffer(raw).ti
    assert loaded is not None
    assert loaded.priv()


def test_leaves_out_hidden_files_and_linked_folders(tmp_path: Path) -> None:
    folder = fill(tmp_path / "release", {"a": 10, ".secret": 1, ".git/x": 1, "sub/c": 1})
    (folder / "loop").symlink_to(folder)
    (folder / "link").symlink_to(folder / "a")

    assert list(listing(folder)) == ["a", "link", "sub/c"]


@pytest.mark.parametrize("kind", FORMATS)
def test_says_why_it_makes_none(tmp_path: Path, kind: TorrentFormat) -> None:
    with pytest.raises(NotFoundError, match="no folder"):
        create_torrent(tmp_path / "nowhere", format=kind)
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(UsageError, match="no bytes"):
        create_torrent(folder, format=kind)
    fill(folder, {"a": 1})
    if kind != "v1":
        with pytest.raises(UsageError, match="holds one file"):
            create_torrent(folder, format=kind)
    fill(folder, {"b": 1})
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedByUserError):
        create_torrent(folder, format=kind, stop=stop)
