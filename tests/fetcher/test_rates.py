import dataclasses
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import UsageError
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.rates import RateLimits, parse_rate
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.session import (
    WAN_UPLOAD_BYTES_PER_S,
    SessionSettings,
    TorrentSession,
)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("0", 0), ("500K", 500_000), ("1.5 MiB/s", 3 << 19), ("2G", 2_000_000_000), ("7", 7)],
)
def test_reads_rates_as_people_write_them(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1", "5i", "1e3", "5 MM", "0.0001k", "nan"])
def test_refuses_others(text: str) -> None:
    with pytest.raises(UsageError, match="0 for no limit"):
        parse_rate(text)


@given(st.integers(1, 10**9))
def test_a_rate_in_bytes_is_itself(rate: int) -> None:
    if rate < 10**9:
        assert parse_rate(str(rate)) == parse_rate(f"{rate}B/s") == rate


class Noted(Exception):
    """The settings were seen."""


@pytest.mark.parametrize(
    ("limits", "down", "up"),
    [
        (None, 0, WAN_UPLOAD_BYTES_PER_S),
        (RateLimits(download_bytes_per_s=5_000_000, upload_bytes_per_s=0), 5_000_000, 0),
        (RateLimits(upload_bytes_per_s=1000), 0, 1000),
    ],
)
def test_limits_reach_the_session(
    tmp_path: Path, limits: RateLimits | None, down: int, up: int
) -> None:
    seen = []

    def noting(settings: SessionSettings) -> TorrentSession:
        seen.append(settings)
        raise Noted

    with (
        pytest.raises(Noted),
        Fetch(
            kind="magnet",
            location=f"magnet:?xt=urn:btih:{'a' * 40}",
            store=tmp_path,
            peers=("127.0.0.1:9",),
            on_progress=lambda progress: None,
            stop=threading.Event(),
            session_factory=noting,
            limits=limits,
        ) as fetch,
    ):
        fetch.metadata()
    (settings,) = seen
    assert (settings.download_bytes_per_s, settings.upload_bytes_per_s) == (down, up)
    session = LibtorrentSession(dataclasses.replace(settings, listen="127.0.0.1:0"))
    theirs = session._session.get_settings()
    session.close()
    assert (theirs["download_rate_limit"], theirs["upload_rate_limit"]) == (down, up)
