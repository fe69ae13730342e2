"""Real libtorrent sessions on loopback; the seeder is another process."""

import contextlib
import dataclasses
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from magnetar.errors import (
    DiskSpaceError,
    InterruptedByUserError,
    MagnetError,
    NotFoundError,
    PreflightError,
    ReleaseError,
    TimedOutError,
    UsageError,
    VerifyError,
)
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.fetch import Fetch, FetchKind
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent.bencode import decode, encode
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.formats import TorrentFormat
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.magnet import exact_topic
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.fetcher.torrent.session import (
    MetadataArrived,
    SessionSettings,
    TorrentJob,
    TorrentSession,
    listening_address,
)
from magnetar.tests.releases import HINTS, Layout, write_release
from magnetar.tests.seeder import seeding
from magnetar.tests.torrent_session import FakeTorrentSession

WEIGHTS = "consolidated.00.pth"
WEIGHTS_BYTES = 3_000_000


def write_files(folder: Path) -> Path:
    """Files with the names of a release; the weights are noise, which nothing here reads."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    (folder / WEIGHTS).write_bytes(noise.randbytes(WEIGHTS_BYTES))
    (folder / "tokenizer.model").write_bytes(noise.randbytes(50_000))
    (folder / "params.json").write_text('{"dim": 64}')
    (folder / "README.md").write_text("surplus" * 100)
    write_sums(folder, WEIGHTS, "tokenizer.model")
    return folder


def write_sums(folder: Path, *names: str) -> None:
    rows = [
        f"║ {hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name} ║" for name in names
    ]
    (folder / "RELEASE").write_text("\n".join(["╔═╗", *rows, "╚═╝"]))


class Shared(NamedTuple):
    """A release folder and a process that shares it."""

    folder: Path
    info: SeedInfo

    @property
    def wanted_bytes(self) -> int:
        """What a complete download holds."""
        return sum(p.stat().st_size for p in self.folder.iterdir() if p.name != "README.md")

    @property
    def piece_length(self) -> int:
        return parse_metainfo(self.info.torrent).piece_length


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = write_files(tmp_path_factory.mktemp("shared") / "tiny-release")
    with seeding(folder) as info:
        yield Shared(folder, info)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = write_files(tmp_path_factory.mktemp("slow") / "tiny-release")
    with seeding(folder, upload_bytes_per_s=1_000_000) as info:
        yield Shared(folder, info)


def no_session(settings: SessionSettings) -> TorrentSession:
    raise AssertionError("nothing may ask the network")


@dataclasses.dataclass
class Fetching:
    """Makes fetches into one store and keeps what they told."""

    store: Path
    told: list[Progress] = dataclasses.field(default_factory=list)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    on_progress: Callable[[Progress], None] = lambda progress: None

    def __call__(
        self,
        location: str,
        *,
        kind: FetchKind = "magnet",
        offline: bool = False,
        timeout_s: float | None = 30,
        peers: tuple[str, ...] = (),
        trackers: tuple[str, ...] = (),
    ) -> Fetch:
        def tell(progress: Progress) -> None:
            self.told.append(progress)
            self.on_progress(progress)

        return Fetch(
            kind=kind,
            location=location,
            store=self.store,
            on_progress=tell,
            stop=self.stop,
            timeout_s=timeout_s,
            peers=peers,
            trackers=trackers,
            node="n1",
            session_factory=no_session if offline else LibtorrentSession,
        )


@pytest.fixture
def fetching(tmp_path: Path) -> Fetching:
    return Fetching(tmp_path / "store")


def complete(fetch: Fetch) -> Path:
    with fetch:
        folder = fetch.download()
        fetch.verify()
    return folder


def assert_same_files(folder: Path, source: Path) -> None:
    names = {path.name for path in source.iterdir()} - {"README.md"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name


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


def test_a_restart_of_the_machine_costs_nothing_of_what_was_synced(
    shared: Shared, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fetching(shared.info.magnet) as fetch:
        fetch.download()
        fetch.verify()
        for thread in threading.enumerate():
            if thread.name == "store-sync":
                thread.join()
    monkeypatch.setattr("magnetar.fetcher.torrent.holding.boot_id", lambda: "another")
    with fetching(shared.info.magnet, offline=True) as fetch:
        fetch.download()
        fetch.verify()
        assert (fetch.received_bytes, fetch.hashed_bytes) == (0, 0)


def test_a_stopped_download_goes_on_without_fetching_or_hashing_again(
    slow: Shared, fetching: Fetching
) -> None:
    def stop_at_a_third(progress: Progress) -> None:
        if progress.phase == "download" and progress.done_bytes > WEIGHTS_BYTES / 3:
            fetching.stop.set()

    fetching.on_progress = stop_at_a_third
    first = fetching(slow.info.magnet)
    with pytest.raises(InterruptedByUserError, match="same command again"):
        complete(first)
    assert first.received_bytes < slow.wanted_bytes
    fetching.stop.clear()
    fetching.on_progress = lambda progress: None
    with fetching(slow.info.magnet) as again:
        folder = again.download()
        assert again.hashed_bytes == 0
        # What libtorrent had requested and not yet received when it was stopped comes again.
        slack = 8 * slow.piece_length
        assert first.received_bytes + again.received_bytes < slow.wanted_bytes + slack
        again.verify()
    assert_same_files(folder, slow.folder)


def killed_at(part: float, magnet: str, store: Path) -> None:
    """Fetches in a process that is killed once this part of the weights is there."""
    code = f"""
import pathlib, threading
from magnetar.fetcher.fetch import Fetch
def tell(progress):
    if progress.phase == "download" and progress.done_bytes > {int(WEIGHTS_BYTES * part)}:
        print("now", flush=True)
fetch = Fetch(kind="magnet", location={magnet!r}, on_progress=tell, timeout_s=30,
              store=pathlib.Path({str(store)!r}), stop=threading.Event())
fetch.download()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_downloads_lose_little_and_hash_only_what_came_last(
    slow: Shared, fetching: Fetching
) -> None:
    for part in (0.3, 0.55, 0.8):
        killed_at(part, slow.info.magnet, fetching.store)
    place = Store(fetching.store).release_folder(slow.info.info_hash)
    on_record = place.record.read().pieces
    assert on_record
    with fetching(slow.info.magnet) as fetch:
        folder = fetch.download()
        assert fetch.received_bytes < slow.wanted_bytes * 0.5
        # Counted in whole pieces.
        unknown = slow.wanted_bytes - (len(on_record) - 2) * slow.piece_length
        assert fetch.hashed_bytes <= unknown
        fetch.verify()
    assert_same_files(folder, slow.folder)
    complete(fetching(slow.info.magnet, offline=True))


def test_a_file_that_another_changed_after_a_kill_is_hashed_and_no_other(
    slow: Shared, fetching: Fetching
) -> None:
    killed_at(0.8, slow.info.magnet, fetching.store)
    place = Store(fetching.store).release_folder(slow.info.info_hash)
    on_record = place.record.read().pieces
    assert len(on_record) > 10
    tokenizer = place.data / "tiny-release" / "tokenizer.model"
    data = bytearray(tokenizer.read_bytes())
    data[20_000] ^= 1
    tokenizer.write_bytes(data)
    future_ns = time.time_ns() + 3600 * 10**9
    os.utime(tokenizer, ns=(future_ns, future_ns))
    with fetching(slow.info.magnet) as fetch:
        folder = fetch.download()
        unknown = slow.wanted_bytes - len(on_record) * slow.piece_length
        assert fetch.hashed_bytes <= unknown + 5 * slow.piece_length
        fetch.verify()
    assert_same_files(folder, slow.folder)


def test_a_lost_or_damaged_record_or_resume_costs_no_download(
    shared: Shared, fetching: Fetching
) -> None:
    complete(fetching(shared.info.magnet))
    place = Store(fetching.store).release_folder(shared.info.info_hash)
    for name, keep in (("record.json", 0.5), ("resume", 0.5), ("record.json", 0), ("resume", 0)):
        raw = (place.root / name).read_bytes()
        (place.root / name).write_bytes(raw[: int(len(raw) * keep)])
        with fetching(shared.info.magnet, timeout_s=10) as fetch:
            fetch.download()
            fetch.verify()
            assert fetch.received_bytes == 0


def test_pieces_whose_rest_was_deleted_are_fetched_again(
    shared: Shared, fetching: Fetching
) -> None:
    folder = complete(fetching(shared.info.magnet))
    place = Store(fetching.store).release_folder(shared.info.info_hash)
    (parts,) = place.data.glob(".*.parts")
    parts.unlink()
    for path in folder.iterdir():
        os.utime(path)
    with fetching(shared.info.magnet) as fetch:
        fetch.verify()
        assert 0 < fetch.received_bytes <= 2 * shared.piece_length
    assert_same_files(folder, shared.folder)


@pytest.mark.parametrize("between", ["runs", "download and verify"])
def test_a_corrupt_byte_costs_one_piece(shared: Shared, fetching: Fetching, between: str) -> None:
    def corrupt(folder: Path) -> None:
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(WEIGHTS_BYTES // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    if between == "runs":
        corrupt(complete(fetching(shared.info.magnet)))
        fetch = fetching(shared.info.magnet)
        before = 0
    else:
        fetch = fetching(shared.info.magnet)
        corrupt(fetch.download())
        before = fetch.received_bytes
    with fetch:
        fetch.verify()
        folder = fetch.download()
        assert fetch.received_bytes - before == shared.piece_length
    assert_same_files(folder, shared.folder)
    complete(fetching(shared.info.magnet, offline=True))


def test_damage_that_kept_size_and_time_shows_in_the_md5_and_is_mended(
    shared: Shared, fetching: Fetching
) -> None:
    with fetching(shared.info.magnet) as fetch:
        folder = fetch.download()
        path = folder / "tokenizer.model"
        times = path.stat()
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        fetch.verify()
    assert_same_files(folder, shared.folder)


def test_truncated_and_deleted_files_come_back(shared: Shared, fetching: Fetching) -> None:
    folder = complete(fetching(shared.info.magnet))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1_000_000])
    (folder / "params.json").unlink()
    with fetching(shared.info.magnet) as fetch:
        assert fetch.download() == folder
        fetch.verify()
        assert fetch.received_bytes < shared.wanted_bytes * 0.75
    assert_same_files(folder, shared.folder)


def test_a_wrong_published_md5_names_the_file_and_both_sums(
    tmp_path: Path, fetching: Fetching
) -> None:
    folder = write_files(tmp_path / "wrong")
    write_sums(folder, WEIGHTS)
    published = hashlib.md5((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / WEIGHTS).write_bytes(b"other weights" * 1000)
    found = hashlib.md5((folder / WEIGHTS).read_bytes()).hexdigest()
    with seeding(folder) as info, fetching(info.magnet) as fetch:
        with pytest.raises(VerifyError) as caught:
            fetch.verify()
        for part in (WEIGHTS, published, found):
            assert part in str(caught.value)


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
        "error",
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


def test_a_release_in_use_says_by_whom(shared: Shared, fetching: Fetching) -> None:
    with fetching(shared.info.magnet) as first:
        first.metadata()
        with (
            fetching(shared.info.magnet) as second,
            pytest.raises(PreflightError, match=f"process {os.getpid()} on"),
        ):
            second.metadata()
    complete(fetching(shared.info.magnet))


def test_a_full_disk_is_said_before_downloading(
    shared: Shared, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with fetching(shared.info.magnet) as fetch:
        with pytest.raises(DiskSpaceError, match=r"needs 3\.2 MB .* 1\.0 MB are free"):
            fetch.check_disk()
        assert fetch.received_bytes == 0
    monkeypatch.undo()
    complete(fetching(shared.info.magnet))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with fetching(shared.info.magnet, offline=True) as fetch:
        fetch.check_disk()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("params.json", WEIGHTS), "missing files: tokenizer"),
        (("model.gguf",), "GGUF"),
    ],
)
def test_what_is_no_release_is_refused_before_downloading(
    tmp_path: Path, fetching: Fetching, names: tuple[str, ...], reason: str
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"x" * 1000)
    with seeding(folder) as info, fetching(info.magnet) as fetch:
        with pytest.raises(ReleaseError, match=reason):
            fetch.metadata()
        assert fetch.received_bytes == 0


def test_bad_arguments_are_refused_at_once(fetching: Fetching) -> None:
    with pytest.raises(MagnetError):
        fetching("magnet:?xt=urn:btih:short")
    with pytest.raises(UsageError, match="HOST:PORT"):
        fetching(f"magnet:?xt=urn:btih:{'a' * 40}", peers=("nowhere",))
    with fetching("/nonexistent.torrent", kind="torrent") as fetch, pytest.raises(NotFoundError):
        fetch.metadata()
    with fetching("/nonexistent", kind="folder") as fetch, pytest.raises(NotFoundError):
        fetch.metadata()


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


def test_urls_of_a_link_may_not_lead_into_the_own_network(
    shared: Shared, fetching: Fetching, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[TorrentJob] = []
    inside = ("http://192.168.1.1/announce", "http://router/admin/", "http://127.0.0.1:1/x/")
    link = f"magnet:?xt=urn:btih:{shared.info.info_hash}&tr={quote(inside[0], safe='')}"
    link += "".join(f"&ws={quote(url, safe='')}" for url in inside[1:])
    link += "&tr=udp%3A%2F%2Ftracker.example%3A1"

    def listen(session: FakeTorrentSession) -> None:
        heard.extend(session.jobs)
        fetching.stop.set()

    with (
        Fetch(
            kind="magnet",
            location=link,
            store=fetching.store,
            web_seeds=inside[2:],
            dht=False,
            on_progress=lambda progress: None,
            stop=fetching.stop,
            session_factory=lambda settings: FakeTorrentSession(script=listen),
        ) as fetch,
        pytest.raises(InterruptedByUserError),
    ):
        fetch.metadata()

    assert heard[0].trackers == ("udp://tracker.example:1",)
    assert heard[0].web_seeds == inside[2:]
    assert "the tracker http://192.168.1.1/announce of the link, which is on this" in caplog.text
    assert "give --web-seed http://router/admin/" in caplog.text
    assert inside[2] not in caplog.text


@pytest.mark.parametrize("url", ["ftp://a.example/", "http://", "a.example", "http://a b/"])
def test_named_urls_must_be_urls(fetching: Fetching, url: str) -> None:
    with pytest.raises(UsageError, match="that can be asked"):
        fetching("magnet:?xt=urn:btih:" + "ab" * 20, trackers=(url,))
