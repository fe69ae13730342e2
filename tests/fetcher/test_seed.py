import socket
import threading
from pathlib import Path

import pytest

from magnetar.errors import InterruptedByUserError, NotFoundError, PortInUseError, UsageError
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent.magnet import parse_magnet
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo, TorrentKind, make_torrent, seed
from magnetar.tests.seeder import seeding


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shared folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"x" * 50_000)
    return folder


def test_hashes_once_while_the_files_look_the_same(tmp_path: Path, folder: Path) -> None:
    told: list[Progress] = []
    cache = tmp_path / "cache"
    raw = make_torrent(folder, cache=cache, on_progress=told.append)
    assert told[-1].done_bytes == told[-1].total_bytes == 50_000
    told.clear()
    assert make_torrent(folder, cache=cache, on_progress=told.append) == raw
    assert told == []
    tracked = TorrentKind(trackers=("udp://a.example:1",))
    assert make_torrent(folder, cache=cache, kind=tracked) != raw
    (folder / "b").write_bytes(b"y")
    assert make_torrent(folder, cache=cache, on_progress=told.append) != raw
    assert told
    assert {path.name for path in folder.iterdir()} == {"a", "b"}


def test_a_damaged_cache_is_made_anew(tmp_path: Path, folder: Path) -> None:
    cache = tmp_path / "cache"
    raw = make_torrent(folder, cache=cache)
    (torrent,) = (cache / "seeds").glob("*.torrent")
    torrent.write_bytes(raw[:-3])
    assert make_torrent(folder, cache=cache) == raw


def test_says_how_others_get_it(folder: Path) -> None:
    with seeding(folder) as info:
        magnet = parse_magnet(info.magnet)
        assert magnet.repairs == ()
        assert magnet.info_hash == info.info_hash == parse_metainfo(info.torrent).info_hash
        assert magnet.name == "shared folder"
        assert magnet.peers == (info.address,)
        host, port = info.address.split(":")
        with socket.create_connection((host, int(port)), timeout=10):
            pass


def test_stops_when_told(folder: Path) -> None:
    stop = threading.Event()
    ready: list[SeedInfo] = []

    def on_ready(info: SeedInfo) -> None:
        ready.append(info)
        stop.set()

    seed(folder, on_ready=on_ready, stop=stop)
    assert ready
    with pytest.raises(InterruptedByUserError):
        seed(folder, on_ready=on_ready, stop=stop)


def test_refuses_what_cannot_be_shared(tmp_path: Path, folder: Path) -> None:
    stop = threading.Event()
    with pytest.raises(NotFoundError):
        seed(tmp_path / "nowhere", on_ready=print, stop=stop)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no bytes"):
        seed(tmp_path / "empty", on_ready=print, stop=stop)
    with pytest.raises(UsageError, match="no IP address"):
        seed(folder, listen="localhost:0", on_ready=print, stop=stop)
    with pytest.raises(UsageError, match="HOST:PORT"):
        seed(folder, listen="127.0.0.1:port", on_ready=print, stop=stop)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PortInUseError):
            seed(folder, listen=address, on_ready=print, stop=stop)
