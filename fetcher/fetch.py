"""One release on its way into a store: metadata, facts, disk check, download, verify."""

import logging
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from ..errors import (
    DiskSpaceError,
    InterruptedByUserError,
    NotFoundError,
    ReleaseError,
    VerifyError,
)
from .config import ReleaseHints
from .layout import Selection, select_files
from .outlook import Outlook
from .ownership import Member, Role
from .piece_map import ByteRange, PieceMap
from .progress import Phase, Progress, ProgressSink
from .store import ReleaseFolder, Store
from .tensors import MissingRangeError
from .torrent.bencode import decode, encode
from .torrent.download import Download
from .torrent.libtorrent_session import LibtorrentSession
from .torrent.magnet import Magnet, parse_magnet, split_peer
from .torrent.metainfo import MAX_METAINFO_BYTES, Metainfo, parse_metainfo
from .torrent.pieces import PieceReader
from .torrent.session import SessionSettings, TorrentSession
from .verify import check_release_sums

if TYPE_CHECKING:
    from .checkpoint.release import ReleaseFacts

FetchKind = Literal["magnet", "torrent", "folder"]

DISK_RESERVE_PERCENT = 5
MAX_REPAIRS = 3

logger = logging.getLogger(__name__)


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
        timeout_s: float | None = None,
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str = "",
        dht: bool | None = None,
        session_factory: Callable[[SessionSettings], TorrentSession] = LibtorrentSession,
        lan_address: str | None = None,
    ) -> None:
        """`dht` None asks the DHT only when no peer is named. `lan_address` is this node's own, on
        which it listens for other nodes that fetch the same release.

        Raises:
            MagnetError: the magnet link is beyond repair. UsageError: a peer is no HOST:PORT.
        """
        self._kind = kind
        self._location = location
        self._store = Store(store)
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._session_factory = session_factory
        self._lan_address = lan_address
        self._magnet: Magnet | None = None
        self._peers = tuple(dict.fromkeys(peers))
        if kind == "magnet":
            self._magnet = parse_magnet(location)
            for repair in self._magnet.repairs:
                logger.warning("magnet link: %s", repair)
            self._peers = tuple(dict.fromkeys(peers + self._magnet.peers))
        for peer in self._peers:
            split_peer(peer)
        self._dht = not self._peers if dht is None else dht
        self._metainfo: Metainfo | None = None
        self._selection: Selection | None = None
        self._place: ReleaseFolder | None = None
        self._download: Download | None = None
        self._sums_bytes = 0

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
        """The torrent's: from the start for a magnet, after `metadata` for a .torrent file."""
        if self._magnet is not None:
            return self._magnet.info_hash
        return self._metainfo.info_hash if self._metainfo is not None else None

    @property
    def received_bytes(self) -> int:
        """Payload that came over the network so far."""
        return self._download.received_bytes if self._download is not None else 0

    @property
    def sent_bytes(self) -> int:
        """Payload that went to others so far."""
        return self._download.sent_bytes if self._download is not None else 0

    def count(self) -> None:
        """Makes `received_bytes` and `sent_bytes` exact; takes over a second after `join`."""
        if self._download is not None:
            self._download.count()

    @property
    def hashed_bytes(self) -> int:
        """Bytes that were read back from the disk so far to check them."""
        pieces = self._download.hashed_bytes if self._download is not None else 0
        return pieces + self._sums_bytes

    def metadata(self) -> Metainfo | None:
        """Learns which files there are, from the store if it was there before; None for a folder.

        Raises:
            NotFoundError: no such .torrent or folder. TimedOutError: nobody had the metadata.
            ReleaseError: unsafe, or not a release that can be loaded. PreflightError: another
            process works on it. InterruptedByUserError.
        """
        if self._kind == "folder":
            if not Path(self._location).is_dir():
                raise NotFoundError(f"there is no folder {self._location}: check the path")
            self._finish("metadata", message=self._location)
            return None
        if self._metainfo is None:
            self._accept(self._find_metainfo())
            self._finish("metadata", message=self._torrent.name)
        return self._torrent

    def facts(self, *, given: ReleaseHints, known: ReleaseHints) -> "ReleaseFacts":
        """The model's facts and tensor index, from the few pieces that hold them.

        Raises:
            What `read_release` raises about the release, and `download` about the network.
        """
        from .checkpoint.release import FolderReader, read_release

        self.metadata()
        if self._kind == "folder":
            return read_release(FolderReader(Path(self._location)), given=given, known=known)
        reader = PieceReader(
            metainfo=self._torrent,
            data=self._in_store.data,
            root=self._chosen.root,
            wanted=self._chosen.wanted,
        )
        if self._transfer.is_intact() and not self._transfer.partial_files():
            reader.mark_readable(range(self._torrent.num_pieces))
            return read_release(reader, given=given, known=known)
        needed = self._transfer.first_look()
        while True:
            reader.mark_readable(self._transfer.fetch_pieces(needed))
            try:
                return read_release(reader, given=given, known=known)
            except MissingRangeError as missing:
                file = reader.file(missing.file)
                more = set(self._torrent.pieces(file, missing.offset, missing.num_bytes)) - needed
                if not more:
                    raise ReleaseError(f"{missing}, though their pieces have") from missing
                needed |= more

    def piece_map(self) -> PieceMap | None:
        """Where the release's files lie among the pieces; None for a folder. Does `metadata`."""
        self.metadata()
        if self._kind == "folder":
            return None
        return PieceMap.of_torrent(self._torrent, root=self._chosen.root)

    def sizes(self) -> dict[str, int]:
        """The release's files and their full sizes in bytes. Does `metadata`."""
        self.metadata()
        if self._kind == "folder":
            from .checkpoint.release import FolderReader

            return dict(FolderReader(Path(self._location)).files())
        return {
            path.removeprefix(self._chosen.root): self._torrent.file(path).length
            for path in self._chosen.wanted
        }

    def restrict(self, ranges: Iterable[ByteRange] | None) -> None:
        """Wants only these bytes of the weights from now on, in whole pieces, and all small files.

        None wants the whole release again. Does `metadata`; a folder is taken as it is.

        Raises:
            ReleaseError: the release has no such bytes.
        """
        piece_map = self.piece_map()
        if piece_map is not None:
            self._transfer.restrict(None if ranges is None else piece_map.pieces(ranges))

    def join(self) -> Member | None:
        """Opens the torrent for other nodes that fetch it too; None for a folder. After `restrict`.

        The session serves them until `close`, whatever this fetch does meanwhile.
        """
        if self.piece_map() is None:
            return None
        address, held = self._transfer.join()
        return Member(host=self._node, address=address, wanted=self._transfer.wanted(), held=held)

    def share(self, role: Role) -> None:
        """Lets the next `download` divide the work with the others. After `join`."""
        self._transfer.share(role)

    def verified(self) -> tuple[ByteRange, ...] | None:
        """The bytes of the release that may be read, after `verify`; None: all of them."""
        piece_map = self.piece_map()
        if piece_map is None or not self._transfer.partial_files():
            return None
        return piece_map.readable(self._transfer.verified())

    @property
    def wanted_bytes(self) -> int:
        """Bytes of what `download` brings, in whole pieces; of a folder 0. After `metadata`."""
        piece_map = self.piece_map()
        return 0 if piece_map is None else piece_map.num_bytes(self._transfer.wanted())

    def outlook(self) -> Outlook:
        """What `download` would bring, and whether there is room. Does `metadata`."""
        sizes, piece_map = self.sizes(), self.piece_map()
        in_torrent = piece_map is not None
        root = self._in_store.root if in_torrent else Path(self._location)
        return Outlook(
            name=self._torrent.name if in_torrent else Path(self._location).name,
            info_hash=self.info_hash,
            files=sizes,
            piece_length=self._torrent.piece_length if in_torrent else 0,
            num_pieces=len(self._transfer.wanted()) if in_torrent else 0,
            wanted_bytes=self.wanted_bytes,
            missing_bytes=self._transfer.missing_bytes() if in_torrent else 0,
            store=self._store.root,
            free_bytes=shutil.disk_usage(root).free,
        )

    def check_disk(self) -> None:
        """Whether the rest of what is wanted fits on the disk.

        Raises:
            DiskSpaceError: it does not; nothing was changed.
        """
        self.metadata()
        if self._kind == "folder":
            return
        needed = self._transfer.missing_bytes() * (100 + DISK_RESERVE_PERCENT) // 100
        free = shutil.disk_usage(self._in_store.root).free
        if needed > free:
            raise DiskSpaceError(
                f"{self._torrent.name} needs {_shown_bytes(needed)} more in {self._store.root}, "
                f"where {_shown_bytes(free)} are free: make room for "
                f"{_shown_bytes(needed - free)}, or name another disk with --store"
            )

    def download(self) -> Path:
        """Fetches all that is wanted; returns the folder that holds params.json or config.json.

        Raises:
            TimedOutError, DownloadError, InterruptedByUserError: what arrived is kept.
        """
        self.metadata()
        if self._kind == "folder":
            self._finish("download", message="the release is a folder already")
            return Path(self._location)
        self._transfer.complete()
        self._finish("download", done=self.wanted_bytes, message=self._torrent.name)
        return self._in_store.data / self._chosen.root

    def verify(self) -> None:
        """Makes sure that the files hold the published bytes, and remembers it.

        Pieces are hashed as they arrive. A file that changed since is hashed again, and only pieces
        that went bad are fetched again. Then come the md5 sums of a RELEASE file, for files
        that are there as a whole. What was verified earlier and looks the same is not read.

        Raises:
            VerifyError: a file differs from its published md5. ReleaseError, and what `download`
            raises.
        """
        self.metadata()
        if self._kind == "folder":
            folder = Path(self._location).resolve()
            self._sums_bytes += check_release_sums(
                base=folder,
                root="",
                record_file=self._store.folder_record(folder),
                on_progress=self._on_progress,
                stop=self._stop,
                node=self._node,
            )
        else:
            self._verify_torrent()
        self._finish("verify", done=self.hashed_bytes)

    def close(self) -> None:
        """Keeps resume data, ends the session and unlocks the store. May be called twice."""
        try:
            if self._download is not None:
                self._download.close()
        finally:
            if self._place is not None:
                self._place.unlock()

    @property
    def _torrent(self) -> Metainfo:
        assert self._metainfo is not None
        return self._metainfo

    @property
    def _chosen(self) -> Selection:
        assert self._selection is not None
        return self._selection

    @property
    def _in_store(self) -> ReleaseFolder:
        assert self._place is not None
        return self._place

    @property
    def _transfer(self) -> Download:
        assert self._download is not None
        return self._download

    def _find_metainfo(self) -> Metainfo:
        """From the .torrent file, the store or the swarm; the release is locked on the way."""
        if self._magnet is None:
            metainfo = _read_torrent_file(Path(self._location))
            self._take_place(metainfo.info_hash, metainfo.trackers, metainfo.web_seeds)
            return metainfo
        magnet = self._magnet
        self._take_place(magnet.info_hash, magnet.trackers, magnet.web_seeds)
        if (stored := self._in_store.metainfo()) is not None:
            return stored
        metainfo = parse_metainfo(encode({b"info": decode(self._transfer.fetch_info())}))
        if magnet.info_hash not in metainfo.info_hashes:
            raise VerifyError(
                f"the metadata has hash {metainfo.info_hash}, not {magnet.info_hash}: "
                "try again with other peers"
            )
        return metainfo

    def _take_place(
        self, info_hash: str, trackers: tuple[str, ...], web_seeds: tuple[str, ...]
    ) -> None:
        if self._place is None:
            self._place = self._store.release_folder(info_hash)
        self._place.lock()
        self._download = Download(
            place=self._place,
            trackers=trackers,
            web_seeds=web_seeds,
            peers=self._peers,
            dht=self._dht,
            timeout_s=self._timeout_s,
            on_progress=self._on_progress,
            stop=self._stop,
            node=self._node,
            session_factory=self._session_factory,
            lan_address=self._lan_address,
        )

    def _accept(self, metainfo: Metainfo) -> None:
        """Takes the metainfo when it is a release that can be loaded, and keeps it."""
        selection = select_files({file.path: file.length for file in metainfo.files})
        self._in_store.refuse_escape(selection.wanted)
        if self._in_store.metainfo() is None:
            self._in_store.save_metainfo(metainfo)
        if surplus := selection.surplus:
            logger.warning(
                "%s: not downloading %d files that are not part of the release: %s%s",
                metainfo.name,
                len(surplus),
                ", ".join(surplus[:5]),
                ", ..." if len(surplus) > 5 else "",
            )
        self._metainfo = metainfo
        self._selection = selection
        self._transfer.choose(metainfo, selection)

    def _verify_torrent(self) -> None:
        for _ in range(MAX_REPAIRS):
            self._transfer.complete(phase="verify")
            try:
                self._sums_bytes += check_release_sums(
                    base=self._in_store.data,
                    root=self._chosen.root,
                    record_file=self._in_store.record,
                    on_progress=self._on_progress,
                    stop=self._stop,
                    node=self._node,
                    partial=self._transfer.partial_files(),
                )
            except VerifyError:
                # Damage that left size and time of a file alone shows in its pieces.
                if not self._transfer.recheck():
                    raise
                continue
            if self._transfer.is_intact():
                return
        raise VerifyError(
            f"the files in {self._in_store.data} keep changing: end what writes there, try again"
        )

    def _finish(self, phase: Phase, *, done: int = 0, message: str = "") -> None:
        if self._stop.is_set():
            raise InterruptedByUserError(
                "stopped; what arrived is kept: run the same command again to go on"
            )
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


def _read_torrent_file(path: Path) -> Metainfo:
    try:
        with path.open("rb") as file:
            return parse_metainfo(file.read(MAX_METAINFO_BYTES + 1))
    except OSError as error:
        raise NotFoundError(
            f"{path} cannot be read ({error.strerror}): check the path of the .torrent file"
        ) from error


def _shown_bytes(count: int) -> str:
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
