"""What is shared reaches others: by tracker alone, from a web seed, and until enough was given."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from magnetar.errors import TimedOutError, UsageError
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.torrent.formats import TorrentFormat
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.magnet import parse_magnet
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo, SeedLimits, TorrentKind, make_torrent, seed
from magnetar.fetcher.torrent.session import SessionSettings
from magnetar.tests.lab.tracker import Tracker
from magnetar.tests.lab.web_seed import WebSeed

WEIGHTS_BYTES = 600_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names of a release; nothing here reads what is in them."""
    folder = tmp_path / "shared" / "a release"
    folder.mkdir(parents=True)
    (folder / "consolidated.00.pth").write_bytes(
        b"".join(at.to_bytes(4, "big") for at in range(WEIGHTS_BYTES // 4))
    )
    (folder / "tokenizer.model").write_bytes(b"t" * 20_000)
    (folder / "params.json").write_text(json.dumps({"dim": 64}))
    return folder


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server that answers while the block runs."""
    thread = threading.Thread(target=server.serve_forever, name="server", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Sharing(threading.Thread):
    """`seed` in a thread of its own."""

    def __init__(
        self, folder: Path, kind: TorrentKind | None = None, limits: SeedLimits | None = None
    ) -> None:
        super().__init__(name="seed", daemon=True)
        self._folder, self._kind, self._limits = folder, kind, limits
        self._ready = threading.Event()
        self.stop = threading.Event()
        self.ended = ""
        self._info: SeedInfo | None = None

    def run(self) -> None:
        def ready(info: SeedInfo) -> None:
            self._info = info
            self._ready.set()

        self.ended = seed(
            self._folder, kind=self._kind, limits=self._limits, on_ready=ready, stop=self.stop
        )

    def __enter__(self) -> SeedInfo:
        self.start()
        assert self._ready.wait(30)
        assert self._info is not None
        return self._info

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.join(30)
        assert not self.is_alive()


class Watched(LibtorrentSession):
    """A session that keeps the flags of what it added, and its settings."""

    seen: list[tuple[SessionSettings, int]]

    def __init__(self, settings: SessionSettings) -> None:
        super().__init__(settings)
        self._settings = settings

    def add(self, job) -> None:  # type: ignore[no-untyped-def]
        super().add(job)
        if job.metainfo is not None:
            Watched.seen.append((self._settings, int(self._handle.flags())))


def fetched(
    location: str,
    store: Path,
    *,
    trackers: tuple[str, ...] = (),
    web_seeds: tuple[str, ...] = (),
    dht: bool | None = False,
    timeout_s: float = 20,
) -> Path:
    """The folder that a fetch of a magnet link or .torrent file brings."""
    Watched.seen = []
    with Fetch(
        kind="magnet" if location.startswith("magnet:") else "torrent",
        location=location,
        store=store,
        trackers=trackers,
        web_seeds=web_seeds,
        timeout_s=timeout_s,
        dht=dht,
        on_progress=lambda progress: None,
        stop=threading.Event(),
        session_factory=Watched,
    ) as fetch:
        found = fetch.download()
        fetch.verify()
    return found


def assert_same_files(found: Path, folder: Path) -> None:
    for path in folder.iterdir():
        assert (found / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format", ["v1", "v2", "hybrid"])
def test_every_format_is_brought_by_its_own_link(
    folder: Path, tmp_path: Path, format: TorrentFormat
) -> None:
    with Sharing(folder, TorrentKind(format=format)) as info:
        assert len(parse_magnet(info.magnet).info_hashes) == (2 if format == "hybrid" else 1)
        assert_same_files(fetched(info.magnet, tmp_path / "store"), folder)


def test_a_private_torrent_is_found_by_its_tracker_alone(folder: Path, tmp_path: Path) -> None:
    import libtorrent

    with running(Tracker(("127.0.0.1", 0))) as url:
        tracker = f"{url}announce"
        with Sharing(folder, TorrentKind(trackers=(tracker,), private=True)) as info:
            path = tmp_path / "a.torrent"
            path.write_bytes(info.torrent)
            found = fetched(str(path), tmp_path / "store", trackers=(tracker,), dht=True)
            assert_same_files(found, folder)
    ((settings, kept),) = Watched.seen
    flags = libtorrent.torrent_flags
    assert not settings.dht
    assert kept & flags.disable_dht
    assert kept & flags.disable_pex
    assert kept & flags.disable_lsd


def test_peers_do_not_send_the_metadata_of_a_private_torrent(folder: Path, tmp_path: Path) -> None:
    with (
        Sharing(folder, TorrentKind(trackers=("udp://127.0.0.1:1",), private=True)) as info,
        pytest.raises(TimedOutError, match=r"connected, waiting for metadata.* \.torrent file"),
    ):
        fetched(info.magnet, tmp_path / "store", timeout_s=1.5)


@pytest.mark.parametrize("format", ["v1", "v2", "hybrid"])
def test_a_web_seed_alone_brings_the_release(
    folder: Path, tmp_path: Path, format: TorrentFormat
) -> None:
    path = tmp_path / "a.torrent"
    with running(server := WebSeed(("127.0.0.1", 0), folder.parent)) as url:
        path.write_bytes(make_torrent(folder, kind=TorrentKind(format=format, web_seeds=(url,))))
        assert parse_metainfo(path.read_bytes()).web_seeds == (url,)
        found = fetched(str(path), tmp_path / "store", web_seeds=(url,))
        assert_same_files(found, folder)
        total = sum(file.stat().st_size for file in folder.iterdir())
        assert total <= server.sent_bytes <= total + 100_000


def test_a_web_seed_helps_a_peer_that_is_slow(folder: Path, tmp_path: Path) -> None:
    slow = SeedLimits(upload_bytes_per_s=20_000)
    with (
        running(server := WebSeed(("127.0.0.1", 0), folder.parent)) as url,
        Sharing(folder, limits=slow) as info,
    ):
        found = fetched(info.magnet, tmp_path / "store", web_seeds=(url,))
        assert_same_files(found, folder)
        assert server.sent_bytes > WEIGHTS_BYTES // 2


def test_sharing_ends_when_enough_was_given(folder: Path, tmp_path: Path) -> None:
    sharing = Sharing(folder, limits=SeedLimits(ratio=0.9))
    with sharing as info:
        fetched(info.magnet, tmp_path / "store")
        sharing.join(20)
        assert not sharing.is_alive()
        assert "the ratio of 0.9 is reached; " in sharing.ended


def test_sharing_ends_when_its_time_is_over(folder: Path) -> None:
    sharing = Sharing(folder, limits=SeedLimits(stop_after_s=0.1))
    with sharing:
        sharing.join(20)
        assert "0.1 s are over; 0 bytes were sent, 0.00 times the files" in sharing.ended


def test_says_which_torrents_cannot_be() -> None:
    with pytest.raises(UsageError, match="name one with --tracker"):
        TorrentKind(private=True)
    with pytest.raises(UsageError, match="no tracker that can be asked"):
        TorrentKind(trackers=("tracker.example",))
    with pytest.raises(UsageError, match="no web seed that can be asked"):
        TorrentKind(web_seeds=("udp://a.example:1",))
