"""A release folder that is there already, and is taken as it is."""

import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotFoundError, VerifyError
from .config import ReleaseHints
from .division import Standing
from .folder_sums import FolderSums
from .outlook import Outlook
from .ownership import Member, Role
from .piece_map import ByteRange, PieceMap
from .progress import ProgressSink
from .store import Store
from .torrent.lending import Lender
from .torrent.traffic import Traffic
from .verify import check_release_sums

if TYPE_CHECKING:
    from .checkpoint.checked_files import LoadChecks
    from .checkpoint.release import ReleaseFacts


class FolderRelease:
    """Stands where `TorrentRelease` stands for a torrent; nothing is fetched."""

    metainfo = None
    wanted_bytes = 0
    received_bytes = 0
    sent_bytes = 0
    traffic = Traffic()

    def __init__(
        self,
        folder: Path,
        *,
        store: Store,
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str,
    ) -> None:
        """Raises NotFoundError where there is no folder."""
        if not folder.is_dir():
            raise NotFoundError(f"there is no folder {folder}: check the path")
        self.name = str(folder)
        self.hashed_bytes = 0
        """Bytes that were read to check them."""
        self.folder = folder
        self._store = store
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._sums = FolderSums(store, folder)

    def facts(self, *, given: ReleaseHints, known: ReleaseHints) -> "ReleaseFacts":
        """See `Fetch.facts`."""
        from .checkpoint.release import FolderReader, read_release

        return read_release(FolderReader(self.folder), given=given, known=known)

    def mend_meanwhile(self, part: ByteRange) -> bool:
        """False: nothing is under way."""
        return False

    def tend(self) -> None:
        """Does nothing."""

    def piece_map(self) -> PieceMap | None:
        """None."""
        return None

    def sizes(self) -> dict[str, int]:
        """The files and their sizes."""
        from .checkpoint.release import FolderReader

        return dict(FolderReader(self.folder).files())

    def restrict(self, ranges: Iterable[ByteRange] | None) -> None:
        """Does nothing: what is there is there."""

    def order(self, steps: Iterable[Iterable[ByteRange]]) -> None:
        """Does nothing."""

    def wait(self, ranges: Iterable[ByteRange], timeout_s: float) -> bool:
        """Whatever it is, it is there."""
        return True

    def load_checks(self) -> "LoadChecks":
        """What was kept of files that look as they did then."""
        from .checkpoint.checked_files import LoadChecks

        return LoadChecks(data=self.folder, manifest=self._sums.known())

    def keep_sums(self, sums: Mapping[ByteRange, str]) -> None:
        """Keeps the sums, and what the files look like."""
        self._sums.keep(sums)

    def mend(self, part: ByteRange) -> None:
        """Raises VerifyError: there is nowhere to fetch it from."""
        raise VerifyError(
            f"{self.folder / part.file} has other bytes at {part.offset} to {part.end} than when "
            "it was last read, though nobody wrote to it: the disk is failing; restore the file"
        )

    def join(self) -> Member | None:
        """None: there is no torrent to share."""
        return None

    def member(self) -> Member | None:
        """None, as `join`."""

    def lend(self, to: Iterable[str]) -> Lender | None:
        return None

    def standing(self) -> Standing | None:
        """None: nothing is divided."""

    def share(self, role: Role) -> None:
        """Does nothing."""

    def count(self) -> None:
        """Does nothing."""

    def verified(self) -> tuple[ByteRange, ...] | None:
        """None: all of it may be read."""
        return None

    def outlook(self) -> Outlook:
        """The files, of which none is wanted."""
        return Outlook(
            name=self.folder.name,
            info_hash=None,
            files=self.sizes(),
            piece_length=0,
            num_pieces=0,
            wanted_bytes=0,
            missing_bytes=0,
            store=self._store.root,
            free_bytes=shutil.disk_usage(self.folder).free,
        )

    def check_disk(self) -> None:
        """Does nothing: no room is needed."""

    def download(self) -> Path:
        """The folder."""
        return self.folder

    def verify(self) -> None:
        """Checks the md5 sums of a RELEASE file. Raises what `Fetch.verify` raises."""
        folder = self.folder.resolve()
        self.hashed_bytes += check_release_sums(
            base=folder,
            root="",
            record_file=self._store.folder_record(folder),
            on_progress=self._on_progress,
            stop=self._stop,
            node=self._node,
        )

    def close(self) -> None:
        """Does nothing."""
