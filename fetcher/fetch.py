"""One release on its way into a store: metadata, facts, disk check, download, verify."""

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from ..errors import InterruptedByUserError
from .config import ReleaseHints
from .division import Standing
from .folder_release import FolderRelease
from .outlook import Outlook
from .ownership import Member, Role
from .piece_map import ByteRange, PieceMap
from .progress import Phase, Progress, ProgressSink
from .rates import RateLimits
from .store import Store
from .stored_look import StoredLook, look_stored
from .torrent.connection import Connection, Sources
from .torrent.lending import Lender
from .torrent.libtorrent_session import LibtorrentSession
from .torrent.metainfo import Metainfo
from .torrent.session import SessionSettings, TorrentSession
from .torrent.traffic import Traffic
from .torrent_release import TorrentRelease
from .torrent_source import TorrentSource

if TYPE_CHECKING:
    from .checkpoint.checked_files import LoadChecks
    from .checkpoint.release import ReleaseFacts

FetchKind = Literal["magnet", "torrent", "folder"]


class Fetch:
    """Brings one release into a store, or takes a folder as it is.

    Methods block and are called from one thread; each does first what an earlier one left out, and
    all may be called again. `stop` ends them with InterruptedByUserError. `close` comes in the end,
    whatever happened (or use it as a context manager). The release is locked in the store from
    `metadata` to `close`.
    """

    def __init__(
        self,
        *,
        kind: FetchKind,
        location: str,
        store: Path,
        peers: tuple[str, ...] = (),
        trackers: tuple[str, ...] = (),
        web_seeds: tuple[str, ...] = (),
        timeout_s: float | None = None,
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str = "",
        dht: bool | None = None,
        session_factory: Callable[[SessionSettings], TorrentSession] = LibtorrentSession,
        lan_address: str | None = None,
        limits: RateLimits | None = None,
        who: str = "",
    ) -> None:
        """`peers`, `trackers` and `web_seeds` are asked besides those of the link. `dht` None asks
        the DHT only when no peer is named. `lan_address` is this node's own, on which it listens
        for other nodes that fetch the same release. `who` wants it, for people who wait for that.

        Raises:
            MagnetError: the magnet link is beyond repair. UsageError: a peer is no HOST:PORT, or
            a tracker or web seed no URL that can be asked.
        """
        self._location = location
        self._store = Store(store)
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._session_factory = session_factory
        self._limits = limits or RateLimits()
        self._source: TorrentSource | None = None
        if kind != "folder":
            self._source = TorrentSource(
                location,
                is_magnet=kind == "magnet",
                store=self._store,
                peers=peers,
                trackers=trackers,
                web_seeds=web_seeds,
                dht=dht,
                lan_address=lan_address,
                connect=self._connect,
                who=who,
            )
        self._found: TorrentRelease | FolderRelease | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def info_hash(self) -> str | None:
        """The torrent's: from the start for a magnet, after `identify` for a .torrent file."""
        return self._source.info_hash if self._source is not None else None

    @property
    def received_bytes(self) -> int:
        """Payload that came over the network so far."""
        return self._found.received_bytes if self._found is not None else 0

    @property
    def sent_bytes(self) -> int:
        """Payload that went to others so far."""
        return self._found.sent_bytes if self._found is not None else 0

    @property
    def traffic(self) -> Traffic:
        """What went over the network so far, by peer and in all; for any thread."""
        return self._found.traffic if self._found is not None else Traffic()

    @property
    def hashed_bytes(self) -> int:
        """Bytes that were read back from the disk so far to check them."""
        return self._found.hashed_bytes if self._found is not None else 0

    @property
    def wanted_bytes(self) -> int:
        """Bytes of what `download` brings, in whole pieces; of a folder 0. Does `metadata`."""
        return self._release().wanted_bytes

    def count(self) -> None:
        """Makes `received_bytes` and `sent_bytes` exact; takes over a second after `join`."""
        if self._found is not None:
            self._found.count()

    def tend(self) -> None:
        """Keeps sessions in order while no other method runs: once a second or so."""
        if self._found is not None:
            self._found.tend()

    def identify(self) -> str | None:
        """The info-hash, before `metadata` and without it; None for a folder.

        Raises:
            NotFoundError: no such .torrent. ReleaseError: it is none.
        """
        return self._source.identify() if self._source is not None else None

    def borrow(self, lenders: Iterable[Lender], *, lan_address: str) -> None:
        """Asks these nodes for what they hold before anybody outside. Before `metadata`.

        `lan_address` is that of this node from which they expect it.
        """
        if self._source is not None:
            self._source.borrow(lenders, lan_address=lan_address)

    def adopt(self, torrent: bytes) -> None:
        """Spares `metadata` its search: another node has found this .torrent. Before it.

        Raises:
            ReleaseError: it is none, or not that of the link.
        """
        if self._source is not None:
            self._source.adopt(torrent)

    def look(self, *, given: ReleaseHints, known: ReleaseHints) -> StoredLook | None:
        """What the store can tell of the release by itself, also while another process works on it.

        None for a folder, and where something is missing: then `metadata` and `facts` find it.
        Before `metadata`, which may be left out.

        Raises:
            What `read_release` raises about the release.
        """
        info_hash = self.identify()
        if info_hash is None:
            return None
        return look_stored(self._store.release_folder(info_hash), given=given, known=known)

    def metadata(self, *, waits: bool = False) -> Metainfo | None:
        """Learns which files there are, from the store if it was there before; None for a folder.

        `waits` while another process works on the release, in place of raising PreflightError.

        Raises:
            NotFoundError: no such .torrent or folder. TimedOutError: nobody had the metadata.
            ReleaseError: unsafe, or not a release that can be loaded. PreflightError: another
            process works on it. InterruptedByUserError.
        """
        if waits and self._source is not None and self._found is None:

            def tell(holder: str) -> None:
                waiting = f"waiting for {holder}, which works on this release"
                self._on_progress(Progress(phase="metadata", message=waiting, node=self._node))

            self._source.await_place(stop=self._stop, timeout_s=self._timeout_s, tell=tell)
        return self._release().metainfo

    def facts(self, *, given: ReleaseHints, known: ReleaseHints) -> "ReleaseFacts":
        """The model's facts and tensor index, from the few pieces that hold them.

        Raises:
            What `read_release` raises about the release, and `download` about the network.
        """
        return self._release().facts(given=given, known=known)

    def piece_map(self) -> PieceMap | None:
        """Where the release's files lie among the pieces; None for a folder. Does `metadata`."""
        return self._release().piece_map()

    def folder(self) -> Path:
        """What holds params.json or config.json, now or after `download`. Does `metadata`."""
        return self._release().folder

    def sizes(self) -> dict[str, int]:
        """The release's files and their full sizes in bytes. Does `metadata`."""
        return self._release().sizes()

    def restrict(self, ranges: Iterable[ByteRange] | None) -> None:
        """Wants only these bytes of the weights from now on, in whole pieces, and all small files.

        None wants the whole release again. Does `metadata`; a folder is taken as it is.

        Raises:
            ReleaseError: the release has no such bytes.
        """
        self._release().restrict(ranges)

    def order(self, steps: Iterable[Iterable[ByteRange]]) -> None:
        """Brings the bytes of the first step first, then those of the next; others come last.

        Wants no more than before. Does `metadata`.

        Raises:
            ReleaseError: the release has no such bytes.
        """
        self._release().order(steps)

    def wait(self, ranges: Iterable[ByteRange], timeout_s: float) -> bool:
        """Whether these bytes are verified and in the files, now or within the time.

        For any thread, while another is in `download` or after it. After `metadata`.
        """
        return self._after_metadata().wait(ranges, timeout_s)

    def load_checks(self) -> "LoadChecks":
        """What the bytes of tensors can be checked against as they are loaded; as `wait`."""
        return self._after_metadata().load_checks()

    def keep_sums(self, sums: Mapping[ByteRange, str]) -> None:
        """Remembers SHA-256 of bytes that were checked otherwise; as `wait`."""
        self._after_metadata().keep_sums(sums)

    def mend(self, part: ByteRange) -> None:
        """Hashes the pieces of these bytes again, and fetches those anew that are not right.

        Raises:
            VerifyError: of a folder, which cannot be mended. What `download` raises.
        """
        self._release().mend(part)

    def mend_meanwhile(self, part: ByteRange) -> bool:
        """As `mend`, for any thread, while another is in `download`.

        False where none is, or it ended before these bytes were right: then `mend` is to be called.
        """
        return self._after_metadata().mend_meanwhile(part)

    def join(self) -> Member | None:
        """Opens the torrent for other nodes that fetch it too; None for a folder. After `restrict`.

        The session serves them until `close`, whatever this fetch does meanwhile.
        """
        return self._release().join()

    def member(self) -> Member | None:
        """The same again, as things are now. For any thread, after `join`."""
        assert self._found is not None, "join comes first"
        return self._found.member()

    def lend(self, to: Iterable[str]) -> Lender | None:
        """Lets nodes with these IP addresses have what is there and what is coming.

        None before `share`. For any thread.
        """
        return self._found.lend(to) if self._found is not None else None

    def standing(self) -> Standing | None:
        """How far the role is; None for a folder. For any thread, after `join`."""
        assert self._found is not None, "join comes first"
        return self._found.standing()

    def share(self, role: Role) -> None:
        """Divides the work of `download` with the others, also while it runs; after `join`.

        For any thread. After a download, the next one brings what the role owes to others.
        """
        self._release().share(role)

    def verified(self) -> tuple[ByteRange, ...] | None:
        """The bytes of the release that may be read, after `verify`; None: all of them."""
        return self._release().verified()

    def outlook(self) -> Outlook:
        """What `download` would bring, and whether there is room. Does `metadata`."""
        return self._release().outlook()

    def check_disk(self) -> None:
        """Whether the rest of what is wanted fits on the disk. Does `metadata`.

        Raises:
            DiskSpaceError: it does not; nothing was changed.
        """
        self._release().check_disk()

    def download(self) -> Path:
        """Fetches all that is wanted; returns `folder`.

        Raises:
            TimedOutError, DownloadError, InterruptedByUserError: what arrived is kept.
        """
        release = self._release()
        folder = release.download()
        self._finish("download", done=release.wanted_bytes, message=release.name)
        return folder

    def verify(self) -> None:
        """Makes sure that the files hold the published bytes, and remembers it.

        Pieces are hashed as they arrive. A file that changed since is hashed again, and only pieces
        that went bad are fetched again. Then come the md5 sums of a RELEASE file, for files
        that are there as a whole. What was verified earlier and looks the same is not read.

        Raises:
            VerifyError: a file differs from its published md5. ReleaseError, and what `download`
            raises.
        """
        self._release().verify()
        self._finish("verify", done=self.hashed_bytes)

    def close(self) -> None:
        """Keeps resume data, ends the session and unlocks the store. May be called twice."""
        try:
            if self._found is not None:
                self._found.close()
        finally:
            if self._source is not None:
                self._source.close()

    def _after_metadata(self) -> TorrentRelease | FolderRelease:
        assert self._found is not None, "metadata comes first"
        return self._found

    def _release(self) -> TorrentRelease | FolderRelease:
        """What `metadata` finds."""
        if self._found is None:
            if self._source is None:
                self._found = FolderRelease(
                    Path(self._location),
                    store=self._store,
                    on_progress=self._on_progress,
                    stop=self._stop,
                    node=self._node,
                )
            else:
                self._found = TorrentRelease(
                    *self._source.find(),
                    store=self._store.root,
                    on_progress=self._on_progress,
                    stop=self._stop,
                    node=self._node,
                )
            self._finish("metadata", message=self._found.name)
        return self._found

    def _connect(self, sources: Sources) -> Connection:
        return Connection(
            sources,
            session_factory=self._session_factory,
            timeout_s=self._timeout_s,
            on_progress=self._on_progress,
            stop=self._stop,
            node=self._node,
            limits=self._limits,
        )

    def _finish(self, phase: Phase, *, done: int = 0, message: str = "") -> None:
        if self._stop.is_set():
            raise InterruptedByUserError("stopped; what arrived is kept")
        self._on_progress(
            Progress(
                phase=phase,
                done_bytes=done,
                total_bytes=done,
                message=message,
                node=self._node,
                finished=True,
            )
        )
