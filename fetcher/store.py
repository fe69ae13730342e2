"""The store: downloaded releases on disk, and what is known to be right about them.

::

    STORE/releases/INFO_HASH/lock          held by the process that works on the release
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

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DiskFullError, DownloadError, PreflightError, ReleaseError
from .torrent.metainfo import MAX_PIECES, Metainfo, parse_metainfo

RECORD_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a file looked like when its bytes were known; a change means that they are not."""

    size: int
    mtime_ns: int
    allocated: int = field(default=0, compare=False)
    """Bytes that it takes on disk; less than its size while it has holes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What was verified, about files that looked like this."""

    complete: bool = False
    """Every wanted file is there and its pieces have the right hashes."""
    pieces: frozenset[int] = frozenset()
    """Pieces that are in the files and have the right hashes; of a complete release too."""
    files: Mapping[str, Fingerprint] = field(default_factory=dict)
    md5: Mapping[str, str] = field(default_factory=dict)
    """MD5 of the files that a RELEASE file names, as computed from their bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRelease:
    """One release of a store."""

    info_hash: str
    name: str
    complete: bool
    num_bytes: int
    """Bytes that its files take on disk."""
    folder: Path


def fingerprints(folder: Path, paths: Iterable[str]) -> dict[str, Fingerprint]:
    """The fingerprints of those of the files that exist."""
    found = {}
    for path in paths:
        try:
            status = os.stat(folder / path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        found[path] = Fingerprint(
            size=status.st_size, mtime_ns=status.st_mtime_ns, allocated=status.st_blocks * 512
        )
    return found


class RecordFile:
    """A `Record` on disk; an unreadable one counts as none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Record:
        """The last record written, or an empty one."""
        try:
            raw = json.loads(self._path.read_bytes())
            if raw["version"] != RECORD_VERSION:
                return Record()
            return Record(
                complete=bool(raw["complete"]),
                files={
                    str(path): Fingerprint(size=int(size), mtime_ns=int(mtime_ns))
                    for path, (size, mtime_ns) in raw["files"].items()
                },
                md5={str(path): str(digest) for path, digest in raw["md5"].items()},
                pieces=_pieces(str(raw.get("pieces", ""))),
            )
        except FileNotFoundError:
            return Record()
        except (ValueError, KeyError, TypeError, AttributeError):
            return Record()

    def write(self, record: Record) -> None:
        """Replaces the record."""
        files = {path: [file.size, file.mtime_ns] for path, file in record.files.items()}
        raw = {
            "version": RECORD_VERSION,
            "complete": record.complete,
            "files": files,
            "md5": dict(record.md5),
            "pieces": _runs(record.pieces),
        }
        replace_file(self._path, json.dumps(raw, indent=1).encode())


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


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that after a crash either the old or the new content is there.

    Raises:
        DownloadError: the disk did not take it; DiskFullError: for want of room.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DownloadError
        raise kind(
            f"{path} could not be written ({error.strerror}): make room and run it again"
        ) from error


def _runs(pieces: Collection[int]) -> str:
    """``0-4,7``: short where pieces lie together, and easy to read."""
    runs: list[list[int]] = []
    for piece in sorted(pieces):
        if runs and runs[-1][1] == piece - 1:
            runs[-1][1] = piece
        else:
            runs.append([piece, piece])
    return ",".join(f"{first}-{last}" for first, last in runs)


def _pieces(runs: str) -> frozenset[int]:
    """What `_runs` wrote. Raises ValueError."""
    found: set[int] = set()
    for run in filter(None, runs.split(",")):
        first, last = map(int, run.split("-"))
        if not 0 <= first <= last < MAX_PIECES:
            raise ValueError(f"pieces {run}")
        found.update(range(first, last + 1))
    return frozenset(found)


def _key(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
