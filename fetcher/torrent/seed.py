"""Sharing a release folder from where it lies, until told to stop."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import NotFoundError, ReleaseError, UsageError
from ..progress import Progress, ProgressSink
from ..store import Record, Store, fingerprints, replace_file
from .contacts import shown
from .create import create_torrent, listing
from .libtorrent_session import LibtorrentSession
from .magnet import Magnet, split_peer
from .metainfo import Metainfo, parse_metainfo
from .session import (
    SessionSettings,
    StorageFailed,
    TorrentJob,
    is_local,
    listening_address,
    own_interfaces,
)

POLL_S = 0.25


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


def make_torrent(
    folder: Path,
    *,
    cache: Path | None = None,
    trackers: tuple[str, ...] = (),
    on_progress: ProgressSink | None = None,
    stop: threading.Event | None = None,
) -> bytes:
    """The .torrent of a folder; a store as `cache` saves hashing files that look unchanged.

    Raises:
        What `create_torrent` raises.
    """
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
        return create_torrent(folder, trackers=trackers, on_hashed=report, stop=stop)
    record, path = Store(cache).seed_files(folder)
    # The trackers are part of the key, for they are part of what is kept.
    key = hashlib.sha256("\n".join(trackers).encode()).hexdigest()
    known = record.read()
    if known.complete and dict(known.files) == now and known.md5.get("trackers") == key:
        try:
            parse_metainfo(raw := path.read_bytes())
        except (FileNotFoundError, ReleaseError):
            pass
        else:
            return raw
    raw = create_torrent(folder, trackers=trackers, on_hashed=report, stop=stop)
    replace_file(path, raw)
    record.write(Record(complete=True, files=now, md5={"trackers": key}))
    return raw


def seed(
    folder: Path,
    *,
    listen: str = "127.0.0.1:0",
    on_ready: Callable[[SeedInfo], None],
    stop: threading.Event,
    cache: Path | None = None,
    trackers: tuple[str, ...] = (),
    upload_bytes_per_s: int = 0,
    on_progress: ProgressSink | None = None,
) -> None:
    """Shares a folder until `stop` is set; blocks. Port 0 takes a free one.

    Hashes the files once, and with a `cache` (a store folder) not again while they look the same.
    A limit counts for peers on the local network too; 0 is none.

    Raises:
        NotFoundError: no such folder. UsageError: nothing in it, or no address to listen on.
        PortInUseError: somebody listens there. ReleaseError: a file cannot be read.
        InterruptedByUserError: stopped while hashing.
    """
    host, port = _listen_address(listen)
    folder = folder.resolve()
    raw = make_torrent(folder, cache=cache, trackers=trackers, on_progress=on_progress, stop=stop)
    metainfo = parse_metainfo(raw)
    session = LibtorrentSession(
        SessionSettings(
            listen=shown((host, port)),
            utp=not is_local(host),
            dht=False,
            leaves_by="" if host in ("0.0.0.0", "::") else host,
            upload_bytes_per_s=upload_bytes_per_s,
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
                trackers=trackers,
                is_seed=True,
                upload_bytes_per_s=upload_bytes_per_s,
            )
        )
        on_ready(_info(metainfo, raw, shown((heard_on.strip("[]"), bound_port)), trackers))
        while not stop.is_set():
            for event in session.poll(POLL_S):
                if isinstance(event, StorageFailed):
                    raise ReleaseError(
                        f"{folder} can no longer be shared, {event.path or 'a file'}: "
                        f"{event.reason}; share it again once the files are back"
                    )
    finally:
        session.close()


def _info(metainfo: Metainfo, raw: bytes, address: str, trackers: tuple[str, ...]) -> SeedInfo:
    magnet = Magnet(
        info_hash=metainfo.info_hash, name=metainfo.name, trackers=trackers, peers=(address,)
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
