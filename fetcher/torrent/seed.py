"""Sharing a release folder from where it lies, until told to stop or enough was given."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import MagnetarError, NotFoundError, ReleaseError, UsageError
from ..folder_sums import FolderSums
from ..progress import Progress, ProgressSink
from ..record import Record, fingerprints, replace_file
from ..store import Store
from .addresses import is_local, own_interfaces
from .contacts import shown
from .create import create_torrent, listing
from .events import StorageFailed
from .formats import TorrentFormat
from .libtorrent_session import LibtorrentSession
from .magnet import Magnet, check_tracker, check_web_seed, split_peer
from .metainfo import Metainfo, parse_metainfo
from .session import SessionSettings, TorrentJob, TorrentSession, listening_address

POLL_S = 0.25
REPORT_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedInfo:
    """How others get what is shared."""

    magnet: str
    """A link that names this seeder."""
    info_hash: str
    address: str
    """``HOST:PORT`` on which it listens."""
    torrent: bytes
    """The .torrent file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorrentKind:
    """What the torrent of a folder is to be, besides the folder's files."""

    format: TorrentFormat = "v1"
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    """HTTP servers that hold the same files (BEP 19)."""
    private: bool = False
    """Peers come from the trackers alone (BEP 27)."""

    def __post_init__(self) -> None:
        for url in self.trackers:
            check_tracker(url)
        for url in self.web_seeds:
            check_web_seed(url)
        if self.private and not self.trackers:
            raise UsageError(
                "a private torrent gets its peers from trackers alone: name one with --tracker"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedLimits:
    """When sharing ends by itself, and how fast it goes; without any it goes on as it can."""

    ratio: float | None = None
    """Bytes sent for each byte of the files."""
    stop_after_s: float | None = None
    upload_bytes_per_s: int = 0
    """For peers on the local network too; 0 is none."""


def make_torrent(
    folder: Path,
    *,
    kind: TorrentKind | None = None,
    cache: Path | None = None,
    on_progress: ProgressSink | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """The .torrent of a folder; a store as `cache` saves hashing files that look unchanged.

    Raises:
        What `create_torrent` raises.
    """
    kind = kind or TorrentKind()
    folder = folder.resolve()
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder} to share: check the path")
    now = fingerprints(folder, listing(folder))

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(
                Progress(phase="verify", done_bytes=done, total_bytes=total, message="hashing")
            )

    if cache is None:
        return create_torrent(folder, **asdict(kind), on_hashed=report, stop=stop)
    record, path = Store(cache).seed_files(folder)
    # What else the torrent says is part of the key, for it is part of what is kept.
    key = hashlib.sha256(repr(kind).encode()).hexdigest()
    known = record.read()
    if known.complete and dict(known.files) == now and known.md5.get("kind") == key:
        try:
            parse_metainfo(raw := path.read_bytes())
        except (FileNotFoundError, ReleaseError):
            pass
        else:
            return raw
    raw = create_torrent(folder, **asdict(kind), on_hashed=report, stop=stop)
    replace_file(path, raw)
    record.write(Record(complete=True, files=now, md5={"kind": key}))
    return raw


def seed(
    folder: Path,
    *,
    kind: TorrentKind | None = None,
    limits: SeedLimits | None = None,
    listen: str = "127.0.0.1:0",
    on_ready: Callable[[SeedInfo], None],
    stop: threading.Event,
    cache: Path | None = None,
    on_progress: ProgressSink | None = None,
) -> str:
    """Shares a folder until `stop` is set or a limit is reached; blocks. Port 0 takes a free one.

    Hashes the files once, and with a `cache` (a store folder) not again while they look the same.
    Returns a clause: why it ended and what was given.

    Raises:
        NotFoundError: no such folder. UsageError: nothing in it, or no address to listen on.
        PortInUseError: somebody listens there. ReleaseError: a file cannot be read.
        InterruptedByUserError: stopped while hashing.
    """
    kind, limits = kind or TorrentKind(), limits or SeedLimits()
    host, port = _listen_address(listen)
    folder = folder.resolve()
    raw = make_torrent(folder, kind=kind, cache=cache, on_progress=on_progress, stop=stop)
    metainfo = parse_metainfo(raw)
    session = LibtorrentSession(
        SessionSettings(
            listen=shown((host, port)),
            utp=not is_local(host),
            dht=False,
            seeks=False,
            leaves_by="" if host in ("0.0.0.0", "::") else host,
            upload_bytes_per_s=limits.upload_bytes_per_s,
        )
    )
    try:
        heard_on, bound_port = listening_address(session)
        if heard_on in ("0.0.0.0", "::"):
            heard_on = own_interfaces((), reaches_out=True).split(",")[0].rpartition(":")[0]
        session.add(
            TorrentJob(
                info_hash=metainfo.info_hash,
                save_path=folder.parent,
                metainfo=metainfo,
                trackers=kind.trackers,
                is_seed=True,
                upload_bytes_per_s=limits.upload_bytes_per_s,
            )
        )
        on_ready(_info(metainfo, raw, shown((heard_on.strip("[]"), bound_port)), kind))
        with _summing(folder, cache):
            return _serve(session, metainfo, folder, limits, stop, on_progress)
    finally:
        session.close()


@contextlib.contextmanager
def _summing(folder: Path, cache: Path | None) -> Iterator[None]:
    """Meanwhile the tensors of the folder get their sums, for whoever loads them from here."""
    if cache is None:
        yield
        return
    sums, over = FolderSums(Store(cache), folder), threading.Event()

    def work() -> None:
        # Any folder may be shared; only releases have tensors.
        with contextlib.suppress(MagnetarError):
            sums.compute(over)

    thread = threading.Thread(target=work, name="seed-sums")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _serve(
    session: TorrentSession,
    metainfo: Metainfo,
    folder: Path,
    limits: SeedLimits,
    stop: threading.Event,
    on_progress: ProgressSink | None,
) -> str:
    """Why it ended. Time is counted by a clock that nobody sets."""
    began_s = told_s = time.monotonic()
    told_bytes = 0
    while True:
        for event in session.poll(POLL_S):
            if isinstance(event, StorageFailed):
                raise ReleaseError(
                    f"{folder} can no longer be shared, {event.path or 'a file'}: "
                    f"{event.reason}; share it again once the files are back"
                )
        status, now_s = session.status(), time.monotonic()
        sent_bytes = status.uploaded_bytes if status is not None else 0
        ratio = sent_bytes / metainfo.total_bytes
        reason = "told to stop" if stop.is_set() else ""
        if limits.ratio is not None and ratio >= limits.ratio:
            reason = f"the ratio of {limits.ratio:g} is reached"
        elif limits.stop_after_s is not None and now_s - began_s >= limits.stop_after_s:
            reason = f"{limits.stop_after_s:g} s are over"
        if reason:
            return f"{reason}; {sent_bytes:,} bytes were sent, {ratio:.2f} times the files"
        if on_progress is not None and status is not None and now_s - told_s >= REPORT_S:
            peers = "1 peer" if status.num_peers == 1 else f"{status.num_peers} peers"
            on_progress(
                Progress(
                    phase="seed",
                    rate_bytes_per_s=(sent_bytes - told_bytes) / (now_s - told_s),
                    message=f"{peers}, ratio {ratio:.2f}",
                )
            )
            told_s, told_bytes = now_s, sent_bytes


def _info(metainfo: Metainfo, raw: bytes, address: str, kind: TorrentKind) -> SeedInfo:
    hashes = metainfo.info_hashes
    magnet = Magnet(
        info_hash=hashes[0],
        info_hash_v2=hashes[1] if len(hashes) > 1 else "",
        name=metainfo.name,
        trackers=kind.trackers,
        web_seeds=kind.web_seeds,
        peers=(address,),
    )
    return SeedInfo(magnet=magnet.uri(), info_hash=metainfo.info_hash, address=address, torrent=raw)


def _listen_address(listen: str) -> tuple[str, int]:
    """IP address and port, which may be 0."""
    host, _, port = listen.rpartition(":")
    takes_any = port == "0"
    host, number = split_peer(f"{host}:1" if takes_any else listen)
    try:
        is_local(host)
    except ValueError as error:
        raise UsageError(
            f"{host!r} is no IP address to listen on: write IP:PORT, for example 127.0.0.1:0"
        ) from error
    return host, 0 if takes_any else number
