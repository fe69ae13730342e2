"""Real libtorrent sessions on loopback; the seeder is another process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from magnetar.errors import (
    TimedOutError,
    VerifyError,
)
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent.bencode import decode, encode
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.events import MetadataArrived
from magnetar.fetcher.torrent.formats import TorrentFormat
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.magnet import exact_topic
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.session import SessionSettings, TorrentJob, listening_address
from magnetar.tests.fetching import (
    WEIGHTS_BYTES,
    Fetching,
    Shared,
    assert_same_files,
    complete,
    write_files,
)
from magnetar.tests.releases import HINTS, Layout, write_release
from magnetar.tests.seeder import seeding
from magnetar.tests.torrent_session import FakeTorrentSession


def test_brings_the_release_identical_and_leaves_surplus_files(
    shared: Shared, fetching: Fetching, caplog: pytest.LogCaptureFixture
) -> None:
    with fetching(shared.info.magnet) as fetch:
        assert fetch.info_hash == shared.info.info_hash
        metainfo = fetch.metadata()
        assert metainfo is not None
        assert metainfo.raw == shared.info.torrent
        fetch.check_disk()
        folder = fetch.download()
        fetch.verify()
        assert shared.wanted_bytes <= fetch.received_bytes
        assert fetch.received_bytes <= shared.wanted_bytes + 2 * shared.piece_length
    assert_same_files(folder, shared.folder)
    said = [r for r in caplog.records if "not part of the release" in r.message]
    assert len(said) == 1
    assert "README.md" in said[0].message
    finished = [progress.phase for progress in fetching.told if progress.finished]
    assert finished == ["metadata", "download", "verify"]
    assert {progress.node for progress in fetching.told} == {"n1"}


def test_running_again_neither_asks_the_network_nor_hashes(
    shared: Shared, fetching: Fetching
) -> None:
    first = complete(fetching(shared.info.magnet))
    with fetching(shared.info.magnet, offline=True) as fetch:
        fetch.check_disk()
        assert fetch.download() == first
        fetch.verify()
        assert (fetch.received_bytes, fetch.hashed_bytes) == (0, 0)
    assert [release.complete for release in Store(fetching.store).releases()] == [True]


@pytest.mark.parametrize("layout", ["mistral-pth", "huggingface-sharded"])
def test_facts_come_from_a_few_pieces_before_the_download(
    tmp_path: Path, fetching: Fetching, layout: Layout
) -> None:
    source = tmp_path / "tiny"
    write_release(source, layout=layout, num_layers=8)
    given = ReleaseHints()
    expected = read_release(FolderReader(source), given=given, known=HINTS)
    with seeding(source) as info:
        with fetching(info.magnet) as fetch:
            assert fetch.facts(given=given, known=HINTS) == expected
            total = sum(path.stat().st_size for path in source.iterdir())
            assert fetch.received_bytes < total / 2
        with fetching(info.magnet) as fetch:
            assert fetch.facts(given=given, known=HINTS) == expected
            assert (fetch.received_bytes, fetch.hashed_bytes) == (0, 0)
            folder = fetch.download()
            fetch.verify()
            assert fetch.facts(given=given, known=HINTS) == expected
    assert_same_files(folder, source)


def test_a_torrent_file_with_a_named_peer_needs_no_metadata_phase(
    tmp_path: Path, shared: Shared, fetching: Fetching
) -> None:
    path = tmp_path / "release.torrent"
    path.write_bytes(shared.info.torrent)
    with fetching(str(path), kind="torrent", peers=(shared.info.address,)) as fetch:
        before = fetch.info_hash
        fetch.metadata()
        assert (before, fetch.info_hash) == (None, shared.info.info_hash)
        assert_same_files(fetch.download(), shared.folder)


@pytest.mark.parametrize(
    ("kind", "topics"),
    [("hybrid", [0]), ("hybrid", [1]), ("hybrid", [0, 1]), ("v2", [0])],
    ids=["hybrid by v1", "hybrid by v2", "hybrid by both", "v2"],
)
def test_brings_newer_torrents_too(
    shared: Shared, fetching: Fetching, kind: TorrentFormat, topics: list[int]
) -> None:
    metainfo = parse_metainfo(create_torrent(shared.folder, format=kind, piece_length=65_536))
    with sharing(metainfo.raw, shared.folder) as address:
        named = "&".join(f"xt={exact_topic(metainfo.info_hashes[topic])}" for topic in topics)
        magnet = f"magnet:?{named}&x.pe={address}"
        assert_same_files(complete(fetching(magnet)), shared.folder)
    complete(fetching(magnet, offline=True))


@pytest.mark.parametrize("topic", ["xt=urn:btih:" + "ab" * 20, "xt=urn:btmh:1220" + "ab" * 32])
def test_metadata_of_another_release_is_refused(
    shared: Shared, fetching: Fetching, topic: str
) -> None:
    root = decode(shared.info.torrent)
    assert isinstance(root, dict)
    other = MetadataArrived(encode(root[b"info"]))
    session = FakeTorrentSession(script=lambda fake: fake.events.append(other))
    with (
        Fetch(
            kind="magnet",
            location=f"magnet:?{topic}",
            store=fetching.store,
            on_progress=lambda progress: None,
            stop=threading.Event(),
            session_factory=lambda settings: session,
        ) as fetch,
        pytest.raises(VerifyError, match="not abababab"),
    ):
        fetch.metadata()
    assert not list(fetching.store.rglob("torrent"))


@contextlib.contextmanager
def sharing(raw: bytes, folder: Path) -> Iterator[str]:
    """Shares a torrent of another version from this process."""
    session = LibtorrentSession(SessionSettings(listen="127.0.0.1:0", utp=False, dht=False))
    host, port = listening_address(session)
    metainfo = parse_metainfo(raw)
    session.add(
        TorrentJob(
            info_hash=metainfo.info_hash,
            save_path=folder.parent,
            metainfo=metainfo,
            is_seed=True,
        )
    )
    yield f"{host}:{port}"
    session.close()


def test_unreachable_peers_time_out_with_their_names(fetching: Fetching) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    magnet = f"magnet:?xt=urn:btih:{'ab' * 20}"
    started_s = time.monotonic()
    tracker = f"http://{address}/announce"
    with (
        fetching(magnet, timeout_s=2, peers=(address,), trackers=(tracker,)) as fetch,
        pytest.raises(TimedOutError) as caught,
    ):
        fetch.metadata()
    assert time.monotonic() - started_s < 15
    for part in (
        "metadata",
        "within 2 s",
        f"http://{address}/announce",
        f"peer {address}",
        "refused",
    ):
        assert part in str(caught.value)
    assert any("no peers" in progress.message for progress in fetching.told)


def test_a_seeder_that_comes_later_is_found(shared: Shared, fetching: Fetching) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    folder: list[Path] = []
    magnet = f"magnet:?xt=urn:btih:{shared.info.info_hash}&x.pe={address}"
    thread = threading.Thread(
        target=lambda: folder.append(complete(fetching(magnet))), name="fetch", daemon=True
    )
    thread.start()
    deadline_s = time.monotonic() + 20
    while not any("no peers" in progress.message for progress in fetching.told):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    with seeding(shared.folder, listen=address):
        thread.join(30)
    assert folder
    assert_same_files(folder[0], shared.folder)


def test_repairs_of_a_link_are_said(
    shared: Shared, fetching: Fetching, caplog: pytest.LogCaptureFixture
) -> None:
    complete(fetching(shared.info.magnet.removeprefix("magnet:?").replace("&", "&amp;")))
    assert "replaced the HTML &amp;" in caplog.text
    assert "added the missing magnet:?" in caplog.text


def test_a_folder_is_taken_as_it_is_and_its_sums_checked_once(
    tmp_path: Path, fetching: Fetching
) -> None:
    folder = write_files(tmp_path / "own")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with fetching(str(folder), kind="folder", offline=True) as fetch:
        assert fetch.metadata() is None
        assert fetch.info_hash is None
        fetch.check_disk()
        assert fetch.download() == folder
        fetch.verify()
        assert fetch.hashed_bytes == WEIGHTS_BYTES + 50_000
    with fetching(str(folder), kind="folder", offline=True) as fetch:
        fetch.verify()
        assert fetch.hashed_bytes == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "tokenizer.model").write_bytes(b"damaged")
    with (
        fetching(str(folder), kind="folder", offline=True) as fetch,
        pytest.raises(VerifyError, match=r"tokenizer\.model has md5"),
    ):
        fetch.verify()
