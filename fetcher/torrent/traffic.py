"""What went between one node and its peers, by peer and in all."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from .contacts import shown
from .session import PeerView

MAX_PEERS: Final = 64
"""Those that gave or took most are told of one by one."""

Side = Literal["lan", "wan"]
"""``lan``: a node of the cluster; everybody else is outside, wherever that is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerTraffic:
    """One connected peer; amounts are payload since it connected."""

    address: str
    """``HOST:PORT``."""
    client: str
    """What it says it runs; not to be trusted."""
    side: Side
    received_bytes: int
    sent_bytes: int
    received_bytes_per_s: float
    sent_bytes_per_s: float
    num_pieces: int
    """That it has."""
    num_bad_pieces: int
    """Of those it had a part in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Of one release on one node, since its fetch began."""

    received_bytes: int = 0
    """Payload from anybody."""
    sent_bytes: int = 0
    lan_received_bytes: int = 0
    """Of `received_bytes`, from nodes of the cluster; a reading a second, so that the last second
    of a peer that left is counted as from outside."""
    lan_sent_bytes: int = 0
    banned: tuple[str, ...] = ()
    """Peers that sent pieces with wrong hashes, as addresses; the latest."""
    num_banned: int = 0
    peers: tuple[PeerTraffic, ...] = ()
    """The busiest of those that are connected."""

    def to_json(self) -> dict[str, Any]:
        """Field names as keys, and what came from and went outside."""
        return asdict(self) | {
            "wan_received_bytes": max(0, self.received_bytes - self.lan_received_bytes),
            "wan_sent_bytes": max(0, self.sent_bytes - self.lan_sent_bytes),
        }


class TrafficLog:
    """Adds readings of peers up, for peers come and go."""

    def __init__(self) -> None:
        self._earlier = (0, 0)
        self._lan: dict[str, tuple[int, int]] = {}
        self._peers: tuple[PeerTraffic, ...] = ()
        self._banned: dict[str, None] = {}
        self._num_banned = 0

    def note(self, peers: Iterable[PeerView], inside: Collection[str]) -> None:
        """A reading of all connected peers; `inside` are IP addresses of the cluster."""
        found = [_traffic(peer, inside) for peer in peers]
        lan: dict[str, tuple[int, int]] = {}
        for peer in found:
            if peer.side == "lan":
                lan[peer.address] = (peer.received_bytes, peer.sent_bytes)
        for address, (received, sent) in self._lan.items():
            now = lan.get(address, (-1, -1))
            if now[0] < received or now[1] < sent:  # That connection is over.
                self._earlier = (self._earlier[0] + received, self._earlier[1] + sent)
        self._lan = lan
        found.sort(key=lambda peer: (-peer.received_bytes - peer.sent_bytes, peer.address))
        self._peers = tuple(found[:MAX_PEERS])

    def note_ban(self, address: str) -> None:
        """A peer is let in no more."""
        self._num_banned += 1
        self._banned[address] = None
        for oldest in list(self._banned)[:-MAX_PEERS]:
            del self._banned[oldest]

    def rates(self) -> tuple[float, float]:
        """Bytes a second that come from inside and from outside, at the last reading."""
        inside = sum(p.received_bytes_per_s for p in self._peers if p.side == "lan")
        return inside, sum(p.received_bytes_per_s for p in self._peers) - inside

    def reading(self, *, received_bytes: int, sent_bytes: int) -> Traffic:
        """Everything so far, with what the session itself has counted."""
        lan = self._lan.values()
        return Traffic(
            received_bytes=received_bytes,
            sent_bytes=sent_bytes,
            lan_received_bytes=min(received_bytes, self._earlier[0] + sum(r for r, _ in lan)),
            lan_sent_bytes=min(sent_bytes, self._earlier[1] + sum(s for _, s in lan)),
            banned=tuple(self._banned),
            num_banned=self._num_banned,
            peers=self._peers,
        )


def added(parts: Sequence[Traffic]) -> Traffic:
    """Several sessions of one node as one."""
    return Traffic(
        received_bytes=sum(part.received_bytes for part in parts),
        sent_bytes=sum(part.sent_bytes for part in parts),
        lan_received_bytes=sum(part.lan_received_bytes for part in parts),
        lan_sent_bytes=sum(part.lan_sent_bytes for part in parts),
        banned=tuple(dict.fromkeys(address for part in parts for address in part.banned)),
        num_banned=sum(part.num_banned for part in parts),
        peers=tuple(peer for part in parts for peer in part.peers)[:MAX_PEERS],
    )


def _traffic(peer: PeerView, inside: Collection[str]) -> PeerTraffic:
    return PeerTraffic(
        address=shown(peer.address),
        client=peer.client,
        side="lan" if peer.address[0] in inside else "wan",
        received_bytes=peer.received_bytes,
        sent_bytes=peer.sent_bytes,
        received_bytes_per_s=peer.received_bytes_per_s,
        sent_bytes_per_s=peer.sent_bytes_per_s,
        num_pieces=peer.num_pieces,
        num_bad_pieces=peer.num_bad_pieces,
    )
