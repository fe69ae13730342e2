"""Getting what arrived out of libtorrent's memory and into the files, a little at a time."""

from collections.abc import Callable, Sequence
from typing import Final

from .session import TorrentSession, TorrentStatus

WRITE_OUT_S: Final = 0.2
"""The write queue is emptied this often: what is in it is lost when the process is killed."""
LULL_S: Final = 2.0
"""After so long without a byte there is nothing left in it. Counts are a second old."""


class WriteOut:
    """Has what is new written, and tells of verified pieces once they are. One thread.

    What a process has written outlives it: so this also bounds what is lost when it is killed.
    """

    def __init__(
        self, session: TorrentSession, on_readable: Callable[[Sequence[bool]], None]
    ) -> None:
        self._session = session
        self._on_readable = on_readable
        self._began_s = self._moved_s = float("-inf")
        self._have: Sequence[bool] = ()
        self._received_bytes = 0
        self._is_under_way = self._has_news = False

    @property
    def is_under_way(self) -> bool:
        """Whether an answer is to come, which says nothing of pieces that came since."""
        return self._is_under_way

    def restart(self) -> None:
        """Another torrent, of which nothing was told."""
        self._have, self._received_bytes, self._is_under_way = (), -1, False

    def keep_up(self, status: TorrentStatus, now_s: float) -> None:
        """Has what arrived since the last time written, if it is time."""
        if self._is_under_way or now_s - self._began_s < WRITE_OUT_S:
            return
        now = status.have, status.downloaded_bytes
        if self._has_news or now != (self._have, self._received_bytes):
            self._moved_s, self._has_news = now_s, True
        if now_s - self._moved_s > LULL_S:
            return
        self._began_s = now_s
        self._have, self._received_bytes = now
        self._is_under_way = True
        self._session.flush()

    def flushed(self, *, has_failed: bool) -> None:
        """The session answered; `has_failed`: but a write went wrong, so that nothing is sure."""
        if self._is_under_way:
            self._is_under_way = False
            if self._has_news and not has_failed:
                self._has_news = False
                self._on_readable(self._have)
