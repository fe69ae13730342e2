"""What a torrent session tells: requests return at once, and their outcomes come as events."""

from dataclasses import dataclass

from .addresses import Address


@dataclass(frozen=True, slots=True)
class MetadataArrived:
    """The info dictionary, with the right hash."""

    info: bytes


@dataclass(frozen=True, slots=True)
class PeerConnected:
    address: Address


@dataclass(frozen=True, slots=True)
class PeerLost:
    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class PeersFound:
    source: str
    num_peers: int


@dataclass(frozen=True, slots=True)
class TrackerFailed:
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class WebSeedFailed:
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class StorageFailed:
    path: str
    reason: str
    is_full: bool


@dataclass(frozen=True, slots=True)
class Listening:
    address: Address


@dataclass(frozen=True, slots=True)
class ListenFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class ResumeData:
    """Empty when libtorrent could not make it."""

    data: bytes


@dataclass(frozen=True, slots=True)
class BadPiece:
    """A piece arrived, or was found, with a wrong hash and is fetched again."""

    piece: int


@dataclass(frozen=True, slots=True)
class PeerBanned:
    """A peer sent bad pieces and is let in no more."""

    address: Address


@dataclass(frozen=True, slots=True)
class Flushed:
    """Everything that was verified when `flush` was called is in the files."""


@dataclass(frozen=True, slots=True)
class Checked:
    """The files on disk were looked at; `TorrentStatus.have` is right from the next reading."""


@dataclass(frozen=True, slots=True)
class Removed:
    """The torrent is gone and its files are closed."""


Event = (
    MetadataArrived
    | PeerConnected
    | PeerLost
    | PeersFound
    | TrackerFailed
    | WebSeedFailed
    | StorageFailed
    | Listening
    | ListenFailed
    | ResumeData
    | BadPiece
    | PeerBanned
    | Flushed
    | Checked
    | Removed
)
