"""The store: downloaded releases on disk, and what is known to be right about them.

::

    STORE/releases/INFO_HASH/lock          held by the process that works on the release
                             lent          held by those that give it to other nodes
                             torrent       checked metainfo, info dictionary alone
                             resume        libtorrent's resume data
                             record.json   fingerprints of the files when they were last verified
                             manifest.json SHA-256 of its tensors, as far as they were ever read
                             data/NAME/... the files
          folders/KEY.json                 the same record for a release folder elsewhere
          folders/KEY.manifest.json        and the same sums
          seeds/KEY.json, KEY.torrent      the torrent made of a folder elsewhere

Every file but the data is replaced as a whole, so that a crash leaves the old one or the new one.
"""

import fcntl
import hashlib
import os
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import PreflightError, ReleaseError
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
        self._lent: int | None = None

    def lock(self) -> None:
        """Takes the release for this process until `unlock`, or until the process ends.

        Raises:
            PreflightError: another process has it; the message says which.
        """
        if self._lock is not None:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        file = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 400, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise PreflightError(
                f"{holder} is working on this release in {self.root}: "
                "wait until it is done, end it, or use another --store"
            ) from error
        except OSError as error:
            os.close(file)
            raise PreflightError(
                f"{self.root} cannot be locked ({error.strerror}): use a --store on a local disk"
            ) from error
        command = " ".join(Path(sys.argv[0]).name.split() + sys.argv[1:2])
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} ({command})".encode(), 0)
        self._lock = file

    def unlock(self) -> None:
        """Gives the release back; does nothing when it is not locked."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def mark_lent(self) -> None:
        """Says to `is_lent` of any process, until `unmark_lent`, that others are given this."""
        if self._lent is None:
            self._lent = os.open(self.root / "lent", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lent, fcntl.LOCK_SH)

    def unmark_lent(self) -> None:
        """Takes that back; does nothing when it was not said."""
        if self._lent is not None:
            os.close(self._lent)
            self._lent = None

    def is_lent(self) -> bool:
        """Whether a process gives this release to other nodes."""
        try:
            file = os.open(self.root / "lent", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

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
                )
            )
        return tuple(sorted(found, key=lambda release: (release.name, release.info_hash)))


def _key(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
