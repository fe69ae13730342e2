"""The seam to BitTorrent: one torrent in one session, called from one thread."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from ...errors import PortInUseError
from .addresses import Address
from .events import Event, ListenFailed, Listening
from .metainfo import Metainfo

WAN_UPLOAD_BYTES_PER_S = 4 << 20
"""libtorrent counts no peers of the local network against limits of a session."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSettings:
    """How a session meets the network."""

    listen: str
    """Comma-separated ``IP:PORT`` in libtorrent's form; port 0 takes a free one."""
    utp: bool
    """uTP crawls on fast links (8.5 MB/s on loopback against 67-125), but passes through NAT."""
    dht: bool
    seeks: bool = True
    """Whether lost peers are asked again within seconds; else it is for them to come back."""
    leaves_by: str = ""
    """IP address from which connections are opened; empty leaves it to the routing table."""
    pex: bool = True
    """Whether peers are told of each other."""
    upload_bytes_per_s: int = WAN_UPLOAD_BYTES_PER_S
    """To outside; 0: no limit."""
    download_bytes_per_s: int = 0
    """From outside; 0: no limit."""
    is_small: bool = False
    """It only gives, and mostly waits: few threads and buffers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorrentJob:
    """What to add to a session: a torrent, or an info-hash whose metadata is wanted."""

    info_hash: str
    save_path: Path
    info_hash_v2: str = ""
    """The second hash of a hybrid torrent, where a link gives both."""
    metainfo: Metainfo | None = None
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    peers: tuple[Address, ...] = ()
    piece_priorities: Sequence[int] = ()
    """One per piece, 0 (never) to 7; without any all are wanted. Exact from the first moment,
    which priorities set later are not."""
    unwanted: Collection[str] = ()
    """Paths of files that are not created, even where they share a piece with a wanted one."""
    known: Collection[int] | None = None
    """Pieces that are in the files with the right hashes. None: nobody knows; all are hashed."""
    found: Mapping[int, Sequence[bool]] = field(default_factory=dict)
    """Of other pieces, which of their blocks may be there. Those that lack none are hashed."""
    begun: Collection[int] = ()
    """Pieces of which `resume` says which blocks are there."""
    resume: bytes | None = None
    """What `request_resume_data` brought; no piece is believed to be there because of it."""
    is_seed: bool = False
    """The files are all there: serve them, checking each piece when it is first asked for."""
    upload_bytes_per_s: int = 0
    """Limit for this torrent, for local peers too; 0: none."""


def pieces_of(have: Iterable[bool]) -> frozenset[int]:
    """The pieces that are there, of a flag for each."""
    return frozenset(piece for piece, is_there in enumerate(have) if is_there)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorrentStatus:
    """A reading of the torrent; amounts count since it was added, unless said otherwise."""

    state: Literal["metadata", "checking", "active"] = "metadata"
    is_paused: bool = False
    num_peers: int = 0
    num_seeds: int = 0
    have: Sequence[bool] = ()
    """By piece: it has the right hash. It may still be in a write queue: `flush` first."""
    checked: float = 0.0
    """Fraction of a check of the files on disk."""
    wanted_bytes: int = 0
    """All pieces with a priority, and what is there of them."""
    wanted_done_bytes: int = 0
    downloaded_bytes: int = 0
    """Payload received."""
    uploaded_bytes: int = 0
    wasted_bytes: int = 0
    """Payload received twice or with a wrong hash."""
    rate_bytes_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerView:
    """One connected peer; amounts are payload since it connected."""

    has_needed: bool
    """It has pieces that we want."""
    chokes_us: bool
    is_suspected: bool = False
    """It had a part in a bad piece and has brought no good one since."""
    address: Address = ("", 0)
    client: str = ""
    """By its own account."""
    received_bytes: int = 0
    sent_bytes: int = 0
    received_bytes_per_s: float = 0.0
    sent_bytes_per_s: float = 0.0
    num_pieces: int = 0
    """That it has."""
    num_bad_pieces: int = 0
    """With wrong hashes, of which it had sent a part."""


class TorrentSession(Protocol):
    """One torrent in one session. Requests return at once; their outcome is an event."""

    def add(self, job: TorrentJob) -> None:
        """Adds the torrent; Checked follows when it has metainfo.

        Raises:
            ReleaseError: the library sees other files in it than we do.
            DownloadError: the library refuses it.
        """
        ...

    def poll(self, timeout_s: float) -> list[Event]:
        """Waits up to `timeout_s` for events and returns them, oldest first."""
        ...

    def status(self) -> TorrentStatus | None:
        """The last reading, at most about a second old; None before the first. Does not block."""
        ...

    def peers(self) -> list[PeerView]:
        """The connected peers; none before `add`. For any thread, blocks for a moment."""
        ...

    def begun(self) -> frozenset[int]:
        """Pieces of which only a part is there; for any thread, blocks for a moment."""
        ...

    def connect(self, peers: Iterable[Address]) -> None:
        """Asks these peers (again); of no use before `add`."""
        ...

    def only(self, hosts: Iterable[str] | None) -> None:
        """Keeps to peers with these IP addresses, and drops all others. None lets everybody in."""
        ...

    def bar(self, hosts: Iterable[str]) -> None:
        """Keeps these IP addresses out, whatever `only` says, and lets others barred before in.

        Pieces that they had begun are left alone until `begin_afresh`.
        """
        ...

    def ask_at_most(self, num_blocks: int | None) -> None:
        """Asks each peer for so many blocks of 16 KiB at a time; None: for as many as usual."""
        ...

    def reach_out(self, wanted: bool) -> None:
        """Whether trackers, the DHT and web seeds are asked, from now on or from the next `add` on.

        Without, nobody new learns of us. At first they are.
        """
        ...

    def prioritize(self, priorities: Sequence[int]) -> None:
        """One priority per piece, 0..7."""
        ...

    def urge(self, pieces: Iterable[int]) -> None:
        """Wants these few pieces before all others."""
        ...

    def flush(self) -> None:
        """Writes queued pieces to the files; Flushed follows."""
        ...

    def request_resume_data(self) -> None:
        """Flushes and makes resume data; ResumeData follows."""
        ...

    def hold(self) -> None:
        """Asks nobody for anything more, and goes on serving; until `go_on`."""
        ...

    def go_on(self) -> None:
        """Downloads again, also after a disk error."""
        ...

    def recheck(self) -> None:
        """Hashes everything on disk again; Checked follows."""
        ...

    def begin_afresh(self) -> None:
        """Forgets unfinished pieces, and what peers are blamed for; Checked follows.

        Pieces that are there stay. Peers are connected anew.
        """
        ...

    def remove(self) -> None:
        """Takes the torrent out and leaves its files; Removed follows."""
        ...

    def close(self) -> None:
        """Ends the session; blocks up to about a second."""
        ...


def listening_address(session: TorrentSession, timeout_s: float = 10.0) -> Address:
    """Waits until the session listens, and says where.

    Raises:
        PortInUseError: it cannot.
    """
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for event in session.poll(0.1):
            if isinstance(event, Listening):
                return event.address
            if isinstance(event, ListenFailed):
                raise PortInUseError(f"cannot listen for peers: {event.reason}; name a free port")
    raise PortInUseError("cannot listen for peers; name a free port with --listen")
