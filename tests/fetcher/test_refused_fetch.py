"""What cannot be fetched is refused, and why is said."""

import os
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from magnetar.errors import (
    DiskSpaceError,
    InterruptedByUserError,
    MagnetError,
    NotFoundError,
    PreflightError,
    ReleaseError,
    UsageError,
)
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.torrent.session import (
    TorrentJob,
)
from magnetar.tests.fetching import WEIGHTS, Fetching, Shared, complete
from magnetar.tests.seeder import seeding
from magnetar.tests.torrent_session import FakeTorrentSession


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
