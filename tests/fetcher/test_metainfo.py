import hashlib
from pathlib import Path
from typing import Any

import libtorrent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import ReleaseError
from magnetar.fetcher.torrent.bencode import encode
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import parse_metainfo

PIECE = 16_384


def info(**changes: Any) -> dict[bytes, Any]:
    base = {
        b"name": b"release",
        b"piece length": PIECE,
        b"pieces": b"\0" * 40,
        b"files": [
            {b"length": 20_000, b"path": [b"a.bin"]},
            {b"length": 5, b"path": [b"sub", b"b.bin"]},
        ],
    }
    changed = {key.replace("_", " ").encode(): value for key, value in changes.items()}
    return {key: value for key, value in (base | changed).items() if value is not None}


def torrent(**changes: Any) -> bytes:
    return encode({b"info": info(**changes)})


def test_reads_files_with_their_place_among_the_pieces() -> None:
    metainfo = parse_metainfo(torrent())
    assert metainfo.info_hash == hashlib.sha1(encode(info())).hexdigest()
    assert [(file.path, file.length, file.offset) for file in metainfo.files] == [
        ("release/a.bin", 20_000, 0),
        ("release/sub/b.bin", 5, 20_000),
    ]
    assert (metainfo.num_pieces, metainfo.total_bytes) == (2, 20_005)
    first, second = metainfo.files
    assert metainfo.pieces(first) == range(2)
    assert metainfo.pieces(first, PIECE - 1, 1) == range(1)
    assert metainfo.pieces(first, PIECE, 1) == range(1, 2)
    assert metainfo.pieces(second) == range(1, 2)
    assert len(metainfo.pieces(second, 5, 0)) == 0
    with pytest.raises(ReleaseError, match="truncated"):
        metainfo.pieces(second, 4, 2)


def test_keeps_only_the_info_dictionary_and_allowed_addresses() -> None:
    raw = encode(
        {
            b"announce": b"udp://a.example:1/announce",
            b"announce-list": [[b"wss://b.example/"], [b"http://c.example/announce"]],
            b"url-list": [b"file:///etc", b"http://d.example/"],
            b"info": info(),
            b"nodes": [[b"e.example", 1]],
        }
    )
    metainfo = parse_metainfo(raw)
    assert metainfo.trackers == ("udp://a.example:1/announce", "http://c.example/announce")
    assert metainfo.web_seeds == ("http://d.example/",)
    assert metainfo.raw == torrent()


@pytest.mark.parametrize(
    "name",
    [
        b"..", b".", b"", b"a/b", b"/etc", b"a\\b", b"c:evil", b"a\0b", b"a\nb", b"NUL", b"con.txt",
        b"lpt1", b"dot.", b"space ", b"\xff", "rtl\u202egnp.exe".encode(), b"x" * 256,
    ],
)  # fmt: skip
def test_refuses_unsafe_names_anywhere(name: bytes) -> None:
    for changes in (
        {"name": name},
        {"files": [{b"length": 20_005, b"path": [name]}]},
        {"files": [{b"length": 20_005, b"path": [name, b"f"]}]},
    ):
        with pytest.raises(ReleaseError):
            parse_metainfo(torrent(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": [{b"length": 0, b"path": [b"l"], b"attr": b"l"}]}, "symbolic link"),
        ({"files": [{b"length": 0, b"path": [b"l"], b"symlink path": [b"x"]}]}, "symbolic link"),
        ({"files": [{b"length": 1, b"path": [b"a"]}, {b"length": 1, b"path": [b"A"]}]}, "twice"),
        (
            {"files": [{b"length": 1, b"path": [b"a"]}, {b"length": 1, b"path": [b"a", b"b"]}]},
            "is a file and a folder",
        ),
        ({"files": [{b"length": -1, b"path": [b"a"]}]}, "of -1 bytes"),
        ({"files": [{b"length": 1 << 50, b"path": [b"a"]}]}, "bytes"),
        ({"files": [{b"length": 1, b"path": [b"d"] * 17}]}, "18 parts"),
        ({"files": []}, "lists no files"),
        ({"files": [{b"path": [b"a"]}]}, "length is no number"),
        ({"piece_length": 1}, "piece length"),
        ({"piece_length": 1 << 30}, "piece length"),
        ({"pieces": b"\0" * 20}, "1 piece hashes for 2"),
        ({"pieces": None}, "no piece hashes"),
    ],
)
def test_refuses_absurd_torrents(changes: dict[str, Any], reason: str) -> None:
    if "files" in changes:
        total = sum(max(0, file.get(b"length", 0)) for file in changes["files"])
        changes = {"pieces": b"\0" * 20 * min(-(-total // PIECE), 10), **changes}
    with pytest.raises(ReleaseError, match=reason):
        parse_metainfo(torrent(**changes))


def test_refuses_what_is_no_torrent() -> None:
    for raw in (b"", b"hello", b"de", b"i1e", encode({b"info": 1})):
        with pytest.raises(ReleaseError):
            parse_metainfo(raw)


@given(st.binary(max_size=100), st.integers(0, 200))
def test_a_damaged_torrent_is_read_or_refused_with_a_release_error(garbage: bytes, at: int) -> None:
    raw = torrent()
    damaged = raw[:at] + garbage + raw[at + len(garbage) :]
    try:
        metainfo = parse_metainfo(damaged)
    except ReleaseError:
        return
    for file in metainfo.files:
        assert not file.path.startswith("/")
        assert ".." not in file.path.split("/")


def fill(folder: Path, **sizes: int) -> None:
    folder.mkdir()
    for name, size in sizes.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(i * 7 % 251 for i in range(size)))


def test_creates_the_torrent_that_libtorrent_would(tmp_path: Path) -> None:
    fill(tmp_path / "release", b=40_000, a=3, sub__c=20_000)
    ours = parse_metainfo(create_torrent(tmp_path / "release", piece_length=PIECE))
    flags = libtorrent.create_torrent.v1_only
    creator = libtorrent.create_torrent(
        libtorrent.list_files(str(tmp_path / "release")), PIECE, flags
    )
    libtorrent.set_piece_hashes(creator, str(tmp_path))
    theirs = parse_metainfo(libtorrent.bencode(creator.generate()))
    assert sorted(file.path for file in ours.files) == sorted(file.path for file in theirs.files)
    loaded = libtorrent.load_torrent_buffer(ours.raw)
    assert loaded.ti is not None
    assert str(loaded.info_hashes.v1) == ours.info_hash
    data = b"".join((tmp_path / file.path).read_bytes() for file in ours.files)
    assert loaded.ti.hash_for_piece(1) == hashlib.sha1(data[PIECE : 2 * PIECE]).digest()


@pytest.mark.parametrize("kind", ["hybrid", "v2"])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "sub__c"]])
def test_agrees_with_libtorrent_about_newer_torrents(tmp_path: Path, kind: str, names: Any) -> None:
    fill(tmp_path / "release", **{name: 20_000 + len(name) for name in names})
    flags = libtorrent.create_torrent
    target = tmp_path / "release"
    creator = libtorrent.create_torrent(
        libtorrent.list_files(str(target)), PIECE, flags.v2_only if kind == "v2" else 0
    )
    libtorrent.set_piece_hashes(creator, str(tmp_path))
    raw = libtorrent.bencode(creator.generate())
    metainfo = parse_metainfo(raw)
    loaded = libtorrent.load_torrent_buffer(metainfo.raw)
    assert loaded.ti is not None
    layout = loaded.ti.layout()
    theirs = {
        layout.file_path(i): (layout.file_size(i), layout.file_offset(i))
        for i in range(layout.num_files())
        if not layout.file_flags(i) & layout.flag_pad_file
    }
    assert {file.path: (file.length, file.offset) for file in metainfo.files} == theirs
    assert metainfo.num_pieces == loaded.ti.num_pieces()
    hashes = [str(loaded.info_hashes.v2)]
    if kind == "hybrid":
        hashes.insert(0, str(loaded.info_hashes.v1))
    assert list(metainfo.info_hashes) == hashes
    assert metainfo.total_bytes == sum(length for length, _ in theirs.values())


def test_refuses_names_that_are_one_on_some_disks_and_absurd_numbers_of_files_and_pieces() -> None:
    two = [{b"length": 1, b"path": [name]} for name in (b"Weights.pth", b"weights.PTH")]
    with pytest.raises(ReleaseError, match="comes twice"):
        parse_metainfo(torrent(files=two, pieces=b"\0" * 20))
    many = [{b"length": 1, b"path": [b"%d" % number]} for number in range(100_000)]
    with pytest.raises(ReleaseError, match="more than 20000 files"):
        parse_metainfo(torrent(files=many, pieces=b"\0" * 20))
    huge = [{b"length": PIECE << 31, b"path": [b"a"]}]
    with pytest.raises(ReleaseError, match="piece hashes for 2147483648 pieces"):
        parse_metainfo(torrent(files=huge, pieces=b"\0" * 20))
