"""Telling peers that send garbage from those that only had a part in the same pieces.

libtorrent takes the blocks of a piece from all peers at once, blames everybody who had a part in a
bad one, and shuts out whoever was blamed four times. Where liars abound, the first pieces cost all
the honest peers too, and nobody is left (with 16 liars of 24, and sometimes with 16 of 64). But who
is blamed once is under suspicion: he brings whole pieces alone until one is right, and a bad one
convicts him and nobody else. So all is well if few blocks are under way when the first piece turns
out bad, and if nobody goes on with what a convicted one had begun.

A bad piece with several suspects therefore makes us begin afresh: blame is forgotten together with
unfinished pieces, and each peer is asked for next to nothing at a time until no bad piece has come
for a while. Whoever is shut out meanwhile stays out, and what he had begun waits until no suspects
are left; then all begin afresh once more.
"""

from typing import Final

from .addresses import Address
from .events import BadPiece, Event, PeerBanned
from .session import TorrentSession, TorrentStatus

CALM_S: Final = 10.0
"""After so long without a bad piece everybody is asked for as much as before."""
SETTLED_S: Final = 0.3
"""For so long no bad piece came before the suspects are asked after."""
STALE_S: Final = 5.0
"""After so long without a byte everybody is let in again: those that were shut out may be honest,
and unfinished pieces may be kept for peers that are gone."""
FEW_BLOCKS: Final = 2
"""Asked for at a time: enough for a peer to have a part in three bad pieces at most, before he is
under suspicion. With three blocks honest ones were shut out (16 of 24 peers lied)."""


class Caution:
    """Watches for bad pieces, and says when the torrent must be begun anew. One thread."""

    def __init__(self, session: TorrentSession, now_s: float) -> None:
        self._session = session
        self._is_careful = False
        self._barred: set[str] = set()
        self._bad_s = self._moved_s = now_s
        self._received_bytes = self._begun_bytes = 0
        self.restart()

    def began_afresh(self) -> None:
        """Takes note that the session has done so: whoever is shut out from now on has lied."""
        self.restart()
        self._is_careful = True

    def restart(self) -> None:
        """Another torrent: nobody is blamed for anything."""
        self._blamed: dict[Address, int] = {}
        self._has_news = self._is_tainted = self._has_convicted = False

    def note(self, event: Event) -> None:
        """Takes what an event says of bad pieces and of who is shut out."""
        if isinstance(event, BadPiece):
            self._has_news = self._is_tainted = True
        elif isinstance(event, PeerBanned) and self._is_careful:
            self._has_convicted = self._is_tainted = True
            self._barred.add(event.address[0])
            self._session.bar(self._barred)

    def look(self, status: TorrentStatus, now_s: float) -> bool:
        """Whether to begin afresh, which `began_afresh` follows; the session is prepared for it."""
        if status.downloaded_bytes != self._received_bytes:
            self._received_bytes, self._moved_s = status.downloaded_bytes, now_s
        if self._is_tainted and now_s - self._moved_s >= STALE_S:
            if not status.num_peers or self._begun_bytes == self._received_bytes:
                self._barred.clear()
                self._session.bar(())
            return self._be_careful(now_s)
        if self._has_news:
            self._has_news, self._bad_s = False, now_s
            num_suspects = self._num_suspects()
            return num_suspects > 1 and not self._is_careful and self._be_careful(now_s)
        calm_s = now_s - self._bad_s
        if self._has_convicted and (calm_s >= CALM_S or self._is_settled(calm_s)):
            return self._be_careful(now_s)
        if self._is_careful and calm_s >= CALM_S:
            self._is_careful = False
            self._session.ask_at_most(None)
        return False

    def _be_careful(self, now_s: float) -> bool:
        self._bad_s = self._moved_s = now_s
        self._begun_bytes = self._received_bytes
        self._session.ask_at_most(FEW_BLOCKS)
        return True

    def _is_settled(self, calm_s: float) -> bool:
        """Whether some were under suspicion and nobody is any more."""
        return (
            calm_s >= SETTLED_S
            and any(self._blamed.values())
            and not any(peer.is_suspected for peer in self._session.peers())
        )

    def _num_suspects(self) -> int:
        """Connected peers that had a part in a bad piece since the last time."""
        before = self._blamed
        self._blamed = {peer.address: peer.num_bad_pieces for peer in self._session.peers()}
        return sum(num > before.get(address, 0) for address, num in self._blamed.items())
