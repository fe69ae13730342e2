"""What a session moves, over all the torrents that it has had, inside the cluster and outside."""

from collections.abc import Callable, Iterable
from typing import Final

from .session import TorrentSession
from .traffic import Traffic, TrafficLog

LOOK_S: Final = 1.0
"""How often the connected peers are asked what they gave and took."""


class Meter:
    """Counts for one session. Amounts and `know` are for any thread, the rest for its owner's."""

    def __init__(self, session: TorrentSession, clock: Callable[[], float]) -> None:
        self._session = session
        self._clock = clock
        self._log = TrafficLog()
        self._inside: frozenset[str] = frozenset()
        self._earlier_received_bytes = self._earlier_sent_bytes = 0
        self._looked_s = clock()

    @property
    def received_bytes(self) -> int:
        """Payload received in all, also under torrents that were removed."""
        status = self._session.status()
        return self._earlier_received_bytes + (status.downloaded_bytes if status else 0)

    @property
    def sent_bytes(self) -> int:
        """Payload sent in all, at the last reading."""
        status = self._session.status()
        return self._earlier_sent_bytes + (status.uploaded_bytes if status else 0)

    @property
    def lan_bytes_per_s(self) -> float:
        """What comes from inside at the moment."""
        inside, _ = self._log.rates()
        return inside

    def traffic(self) -> Traffic:
        """What went between us and our peers, at the last reading."""
        return self._log.reading(received_bytes=self.received_bytes, sent_bytes=self.sent_bytes)

    def know(self, hosts: Iterable[str]) -> None:
        """These IP addresses are nodes of the cluster, which `traffic` counts as inside."""
        self._inside |= frozenset(hosts)

    def note_ban(self, address: str) -> None:
        """A peer is let in no more; ``HOST:PORT``."""
        self._log.note_ban(address)

    def look(self) -> None:
        """Takes a reading of all connected peers: before any are shut out, and now and then."""
        self._looked_s = self._clock()
        self._log.note(self._session.peers(), self._inside)

    def keep_up(self, now_s: float) -> None:
        """Takes a reading if the last is a second old."""
        if now_s - self._looked_s >= LOOK_S:
            self.look()

    def close_torrent(self) -> None:
        """The torrent is about to be removed: its counts are kept, the next begins at nothing."""
        self.look()
        self._earlier_received_bytes, self._earlier_sent_bytes = (
            self.received_bytes,
            self.sent_bytes,
        )
