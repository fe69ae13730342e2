"""Who was asked for a torrent and what they said: the answer to "why does nothing move?"."""

from collections.abc import Sequence

from .events import (
    BadPiece,
    Event,
    ListenFailed,
    PeerConnected,
    PeerLost,
    PeersFound,
    TrackerFailed,
    WebSeedFailed,
)
from .session import PeerView, TorrentStatus

MAX_NAMED = 3
MAX_SEEN = 1000
"""Peers told apart; over days, and from many ports, there could be any number of them."""


class Contacts:
    """What events said about trackers, web seeds and peers, kept for messages to people."""

    def __init__(self, *, trackers: Sequence[str], peers: Sequence[str], dht: bool) -> None:
        self._trackers = dict.fromkeys(trackers, "no answer yet")
        self._named_peers = tuple(peers)
        self._dht = dht
        self._connected: set[str] = set()
        self._num_found = 0
        self._last_error = ""
        self.num_bad_pieces = 0

    def note(self, event: Event) -> None:
        """Takes what an event says about the others."""
        match event:
            case PeerConnected(address):
                if len(self._connected) < MAX_SEEN:
                    self._connected.add(shown(address))
            case PeerLost(address, reason):
                self._last_error = f"peer {shown(address)}: {reason.lower()}"
            case PeersFound(source, num_peers):
                self._num_found += num_peers
                if source in self._trackers:
                    self._trackers[source] = f"{num_peers} peers"
            case TrackerFailed(url, reason):
                self._trackers[url] = reason.lower()
                self._last_error = f"tracker {url}: {reason.lower()}"
            case WebSeedFailed(url, reason):
                self._last_error = f"web seed {url}: {reason.lower()}"
            case ListenFailed(reason):
                self._last_error = reason
            case BadPiece(_):
                self.num_bad_pieces += 1

    def failed(self, error: str) -> None:
        """Takes a failure that no event carries, such as a host name that does not resolve."""
        self._last_error = error

    def asked(self) -> str:
        """A clause: who was asked, how many peers were seen, and the last error."""
        parts = []
        for url, outcome in list(self._trackers.items())[:MAX_NAMED]:
            parts.append(f"tracker {url} ({outcome})")
        if (more := len(self._trackers) - MAX_NAMED) > 0:
            parts.append(f"{more} more trackers")
        parts += [f"peer {peer}" for peer in self._named_peers[:MAX_NAMED]]
        if (more := len(self._named_peers) - MAX_NAMED) > 0:
            parts.append(f"{more} more peers")
        if self._dht:
            parts.append("the DHT")
        asked = ", ".join(parts) or "nobody: the link names no tracker and no peer"
        seen = max(len(self._connected), self._num_found)
        told = {f"tracker {url}: {outcome}" for url, outcome in self._trackers.items()}
        new = self._last_error and self._last_error not in told
        error = f"; last error: {self._last_error}" if new else ""
        at_least = "at least " if len(self._connected) == MAX_SEEN else ""
        return f"asked {asked}; {at_least}{seen} peers seen{error}"

    def waiting_for(
        self, status: TorrentStatus | None, peers: Sequence[PeerView], *, with_error: bool = True
    ) -> str:
        """A clause: why nothing arrives, given the reading and the connected peers."""
        if status is not None and status.is_paused:
            return "paused"
        if not peers:
            error = f" ({self._last_error})" if with_error and self._last_error else ""
            return f"no peers{error}"
        count = "1 peer" if len(peers) == 1 else f"{len(peers)} peers"
        if status is not None and status.state == "metadata":
            return f"{count} connected, waiting for metadata"
        useful = [peer for peer in peers if peer.has_needed]
        if not useful:
            return f"{count} connected, none has the pieces we need"
        if all(peer.chokes_us for peer in useful):
            return f"{count} connected, none lets us download yet"
        if self.num_bad_pieces:
            return f"{count} connected, {self.num_bad_pieces} pieces came with wrong hashes"
        return f"{count} connected, nothing arrives"


def shown(address: tuple[str, int]) -> str:
    """``HOST:PORT``, IPv6 in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
