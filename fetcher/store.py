"""The store: downloaded releases on disk, and what is known to be right about them.

::

    STORE/releases/INFO_HASH/lock          held by the process that works on the release
                             use           held by those that read the release, or lend it
                             torrent       checked metainfo, info dictionary alone
                             resume        libtorrent's resume data
                             record.json   fingerprints of the files when they were last verified
                             manifest.json SHA-256 of its tensors, as far as they were ever read
                             data/NAME/... the files
          trash/...                        what `store gc` is about to delete
          folders/KEY.json                 the same record for a release folder elsewhere
          folders/KEY.manifest.json        and the same sums
          seeds/KEY.json, KEY.torrent      the torrent made of a folder elsewhere

Every file but the data is replaced as a whole, so that a crash leaves the old one or the new one.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError, PreflightError, ReleaseError
from .record import RecordFile, fingerprints, replace_file
from .torrent.metainfo import Metainfo, parse_metainfo


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRelease:
    """One release of a store."""

    info_hash: str
    name: str
    complete: bool
    num_bytes: int
    """Bytes that its files take on disk."""
    folder: Path
    used_s: float
    """When it was last fetched into, checked or taken for use, in seconds of the system's clock."""


class ReleaseFolder:
    """One release of the store. Lock it before anything else."""

    def __init__(self, root: Path, info_hash: str) -> None:
        self.info_hash = info_hash
        self.root = root
        self.data = root / "data"
        self.record = RecordFile(root / "record.json")
        self.manifest_path = root / "manifest.json"
        self._torrent = root / "torrent"
        self._resume = root / "resume"
        self._lock: int | None = None
        self._used: int | None = None

    def lock(self, who: str = "") -> None:
        """Takes the release for this process until `unlock`, or until the process ends.

        `who` works on it, for people; the command where nothing is said.

        Raises:
            PreflightError: another process has it; the message says which.
        """
        if (holder := self.try_lock(who)) is not None:
            raise PreflightError(
                f"{holder} is working on this release in {self.root}: "
                "wait until it is done, end it, or use another --store"
            )

    def try_lock(self, who: str = "") -> str | None:
        """As `lock`, but where another process has the release, says which in place of raising."""
        if self._lock is not None:
            return None
        try:
            file = self._flocked("lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._holder()
        except OSError as error:
            raise PreflightError(
                f"{self.root} cannot be locked ({error.strerror}): use a --store on a local disk"
            ) from error
        who = who or " ".join(Path(sys.argv[0]).name.split() + sys.argv[1:2])
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} ({who})".encode(), 0)
        self._lock = file
        return None

    def unlock(self) -> None:
        """Gives the release back; does nothing when it is not locked."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def use(self) -> None:
        """Keeps the release from being deleted until `end_use`, or until the process ends.

        Any number of processes may; none is kept from fetching into it.
        """
        if self._used is None:
            self._used = self._flocked("use", fcntl.LOCK_SH)
            os.utime(self._used)

    def end_use(self) -> None:
        """Takes that back; does nothing when it was not said."""
        if self._used is not None:
            os.close(self._used)
            self._used = None

    def is_used(self) -> bool:
        """Whether another process works on the release or uses it."""
        for name in ("lock", "use"):
            if not (self.root / name).exists():
                continue
            try:
                os.close(self._flocked(name, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                return True
        return False

    def used_s(self) -> float:
        """When it was last locked or used, by the system's clock; 0 for never."""
        times = [0.0]
        for name in ("lock", "use"):
            with contextlib.suppress(OSError):
                times.append((self.root / name).stat().st_mtime)
        return max(times)

    def discard(self, trash: Path) -> None:
        """Moves the release out of the store, into a new folder of that name, in one step.

        Raises:
            PreflightError: a process works on it or uses it. DownloadError: it cannot be moved.
        """
        self.lock()
        try:
            use = self._flocked("use", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.unlock()
            raise PreflightError(
                f"a deployment or another process uses the release in {self.root}: end it first"
            ) from error
        try:
            trash.parent.mkdir(parents=True, exist_ok=True)
            self.root.rename(trash)
        except OSError as error:
            raise DownloadError(f"{self.root} cannot be moved ({error.strerror})") from error
        finally:
            os.close(use)
            self.unlock()

    def _flocked(self, name: str, operation: int) -> int:
        """A file of the release, locked; not one that was deleted while we waited for it."""
        path = self.root / name
        while True:
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # The folder went just now.
            try:
                fcntl.flock(file, operation)
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
            except FileNotFoundError:
                pass
            except OSError:
                os.close(file)
                raise
            os.close(file)

    def _holder(self) -> str:
        try:
            return (self.root / "lock").read_bytes()[:400].decode(errors="replace").strip()
        except OSError:
            return "another process"

    def metainfo(self) -> Metainfo | None:
        """The metainfo saved earlier, if it is there and belongs to this info-hash."""
        try:
            metainfo = parse_metainfo(self._torrent.read_bytes())
        except (FileNotFoundError, ReleaseError):
            return None
        return metainfo if self.info_hash in metainfo.info_hashes else None

    def save_metainfo(self, metainfo: Metainfo) -> None:
        """Keeps the metainfo, so that later runs need no peer for it."""
        replace_file(self._torrent, metainfo.raw)

    def resume_data(self) -> bytes | None:
        """What `save_resume_data` kept."""
        try:
            return self._resume.read_bytes()
        except FileNotFoundError:
            return None

    def save_resume_data(self, data: bytes) -> None:
        """Keeps libtorrent's resume data."""
        replace_file(self._resume, data)

    def refuse_escape(self, paths: Iterable[str]) -> None:
        """Raises ReleaseError when a path leads out of the data folder, by a link planted there."""
        inside = self.data.resolve()
        for path in paths:
            if not (self.data / path).resolve().is_relative_to(inside):
                raise ReleaseError(
                    f"{self.data / path} leads out of the store through a link: remove the link"
                )


class Store:
    """A folder that keeps releases, by info-hash."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def release_folder(self, info_hash: str) -> ReleaseFolder:
        """The place of a release, whether or not anything is there yet."""
        return ReleaseFolder(self.root / "releases" / info_hash, info_hash)

    def folder_record(self, folder: Path) -> RecordFile:
        """What is known about a release folder that lies elsewhere."""
        return RecordFile(self.root / "folders" / f"{_key(folder)}.json")

    def folder_manifest(self, folder: Path) -> Path:
        """Where the sums of the tensors of such a folder are kept."""
        return self.root / "folders" / f"{_key(folder)}.manifest.json"

    def seed_files(self, folder: Path) -> tuple[RecordFile, Path]:
        """The record and the .torrent of a folder that is shared from where it lies."""
        key = self.root / "seeds" / _key(folder)
        return RecordFile(key.with_suffix(".json")), key.with_suffix(".torrent")

    @property
    def trash(self) -> Path:
        """Holds what is about to be deleted, and what a crash kept from it."""
        return self.root / "trash"

    def held_bytes(self, info_hash: str | None) -> int:
        """What is here of one release, complete or not; 0 of none."""
        of = (each.num_bytes for each in self.releases() if each.info_hash == info_hash)
        return next(of, 0)

    def releases(self) -> tuple[StoredRelease, ...]:
        """Every release whose metainfo is there, complete or not, by name."""
        found = []
        for root in (self.root / "releases").glob("*"):
            place = self.release_folder(root.name)
            if (metainfo := place.metainfo()) is None:
                continue
            paths = [file.path for file in metainfo.files]
            now = fingerprints(place.data, paths)
            record = place.record.read()
            found.append(
                StoredRelease(
                    info_hash=root.name,
                    name=metainfo.name,
                    complete=record.complete
                    and all(now.get(path) == known for path, known in record.files.items()),
                    num_bytes=sum(file.allocated for file in now.values()),
                    folder=place.data / metainfo.name,
                    used_s=place.used_s(),
                )
            )
        return tuple(sorted(found, key=lambda release: (release.name, release.info_hash)))


def _key(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
