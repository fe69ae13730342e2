"""One release of a torrent on its way into its store: facts, disk check, download, verify."""

import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DiskSpaceError, ReleaseError, VerifyError
from .config import ReleaseHints
from .division import Standing
from .layout import Selection
from .manifest import ManifestFile
from .outlook import Outlook
from .ownership import Member, Role
from .piece_map import ByteRange, PieceMap
from .progress import ProgressSink
from .store import ReleaseFolder
from .tensors import MissingRangeError
from .torrent.connection import Connection
from .torrent.download import Download
from .torrent.holding import Holding
from .torrent.lending import Lender
from .torrent.metainfo import Metainfo
from .torrent.pieces import PieceReader
from .torrent.traffic import Traffic
from .verify import check_release_sums
from .waves import waves_of

if TYPE_CHECKING:
    from .checkpoint.checked_files import LoadChecks
    from .checkpoint.release import ReleaseFacts

DISK_RESERVE_PERCENT = 5
MAX_REPAIRS = 3


class TorrentRelease:
    """What `Fetch` does once it is known which files there are. One thread."""

    def __init__(
        self,
        place: ReleaseFolder,
        metainfo: Metainfo,
        selection: Selection,
        connection: Connection,
        lenders: Iterable[Lender] = (),
        *,
        store: Path,
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str,
    ) -> None:
        """`place` is locked; it and `connection` are ended by their owner, after `close`."""
        self.metainfo = metainfo
        self.name = metainfo.name
        self._place = place
        self._selection = selection
        self._connection = connection
        self._holding = Holding(place, metainfo, selection)
        self._download = Download(self._holding, connection)
        self._download.borrow(lenders)
        self._store = store
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._sums_bytes = 0
        self._manifest = ManifestFile(place.manifest_path)
        self._manifest_lock = threading.Lock()

    @property
    def received_bytes(self) -> int:
        """See `Fetch`, also for the next ones."""
        return self._connection.received_bytes

    @property
    def sent_bytes(self) -> int:
        return self._connection.sent_bytes

    @property
    def traffic(self) -> Traffic:
        return self._connection.traffic

    @property
    def hashed_bytes(self) -> int:
        return self._download.hashed_bytes + self._sums_bytes

    @property
    def wanted_bytes(self) -> int:
        return self._holding.piece_map.num_bytes(self._holding.wanted())

    def count(self) -> None:
        self._download.count()

    def tend(self) -> None:
        self._download.tend()

    def facts(self, *, given: ReleaseHints, known: ReleaseHints) -> "ReleaseFacts":
        from .checkpoint.release import read_release

        reader = PieceReader(
            metainfo=self.metainfo,
            data=self._place.data,
            root=self._selection.root,
            wanted=self._selection.wanted,
        )
        if self._holding.is_intact() and not self._holding.partial_files():
            reader.mark_readable(range(self.metainfo.num_pieces))
            return read_release(reader, given=given, known=known)
        needed = self._holding.first_look()
        while True:
            reader.mark_readable(self._download.fetch_pieces(needed))
            try:
                return read_release(reader, given=given, known=known)
            except MissingRangeError as missing:
                file = reader.file(missing.file)
                more = set(self.metainfo.pieces(file, missing.offset, missing.num_bytes)) - needed
                if not more:
                    raise ReleaseError(f"{missing}, though their pieces have") from missing
                needed |= more

    def piece_map(self) -> PieceMap | None:
        return self._holding.piece_map

    def sizes(self) -> dict[str, int]:
        return {
            path.removeprefix(self._selection.root): self.metainfo.file(path).length
            for path in self._selection.wanted
        }

    @property
    def folder(self) -> Path:
        return self._place.data / self._selection.root

    def restrict(self, ranges: Iterable[ByteRange] | None) -> None:
        self._holding.restrict(None if ranges is None else self._holding.piece_map.pieces(ranges))

    def order(self, steps: Iterable[Iterable[ByteRange]]) -> None:
        self._holding.order(waves_of(steps, self._holding.piece_map))

    def wait(self, ranges: Iterable[ByteRange], timeout_s: float) -> bool:
        return self._download.arrival.wait(self._holding.piece_map.pieces(ranges), timeout_s)

    def load_checks(self) -> "LoadChecks":
        from .checkpoint.checked_files import LoadChecks

        return LoadChecks(
            data=self._place.data,
            root=self._selection.root,
            metainfo=self.metainfo,
            wanted=self._selection.wanted,
            manifest=self._manifest.read(),
        )

    def keep_sums(self, sums: Mapping[ByteRange, str]) -> None:
        with self._manifest_lock:
            self._manifest.write(self._manifest.read().merged(sums))

    def mend(self, part: ByteRange) -> None:
        self._download.mend(frozenset(self._holding.piece_map.pieces_of(part)))

    def mend_meanwhile(self, part: ByteRange) -> bool:
        return self._download.mend_meanwhile(frozenset(self._holding.piece_map.pieces_of(part)))

    def join(self) -> Member | None:
        self._download.join()
        return self.member()

    def member(self) -> Member | None:
        return self._download.member(self._node)

    def lend(self, to: Iterable[str]) -> Lender | None:
        return self._download.lend(self._node, to)

    def standing(self) -> Standing | None:
        return self._download.standing()

    def share(self, role: Role) -> None:
        self._download.share(role)

    def verified(self) -> tuple[ByteRange, ...] | None:
        if not self._holding.partial_files():
            return None
        return self._holding.piece_map.readable(self._holding.verified())

    def outlook(self) -> Outlook:
        return Outlook(
            name=self.name,
            info_hash=self._place.info_hash,
            files=self.sizes(),
            piece_length=self.metainfo.piece_length,
            num_pieces=len(self._holding.wanted()),
            wanted_bytes=self.wanted_bytes,
            missing_bytes=self._holding.missing_bytes(),
            store=self._store,
            free_bytes=shutil.disk_usage(self._place.root).free,
        )

    def check_disk(self) -> None:
        needed = self._holding.missing_bytes() * (100 + DISK_RESERVE_PERCENT) // 100
        free = shutil.disk_usage(self._place.root).free
        if needed > free:
            raise DiskSpaceError(
                f"{self.name} needs {_shown_bytes(needed)} more in {self._place.root}, "
                f"where {_shown_bytes(free)} are free: make room for "
                f"{_shown_bytes(needed - free)}, or name another disk with --store"
            )

    def download(self) -> Path:
        self._download.complete()
        return self.folder

    def verify(self) -> None:
        for _ in range(MAX_REPAIRS):
            self._download.complete(phase="verify")
            try:
                self._sums_bytes += check_release_sums(
                    base=self._place.data,
                    root=self._selection.root,
                    record_file=self._place.record,
                    on_progress=self._on_progress,
                    stop=self._stop,
                    node=self._node,
                    partial=self._holding.partial_files(),
                )
            except VerifyError:
                # Damage that left size and time of a file alone shows in its pieces.
                if not self._download.recheck():
                    raise
                continue
            if self._holding.is_intact():
                return
        raise VerifyError(
            f"the files in {self._place.data} keep changing: end what writes there, try again"
        )

    def close(self) -> None:
        """Keeps what resumes the download."""
        self._download.close()


def _shown_bytes(count: int) -> str:
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
