"""What is known of the files of a release, kept on disk."""

import contextlib
import errno
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DiskFullError, DownloadError
from .torrent.metainfo import MAX_PIECES

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
    is_writing: bool = False
    """The files were being written: by now they may hold more, and look different."""
    boot: str = ""
    """When the machine was started under which this was written; empty: nobody knows."""
    synced: frozenset[int] = frozenset()
    """Pieces that were on the disk, and not only in the memory of the machine."""

    def lasting(self, boot: str) -> frozenset[int]:
        """Pieces that are still there, on a machine that has been up since `boot`."""
        return self.pieces if self.boot == boot else self.pieces & self.synced


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
            pieces = _pieces(str(raw.get("pieces", "")))
            return Record(
                complete=bool(raw["complete"]),
                files={
                    str(path): Fingerprint(size=int(size), mtime_ns=int(mtime_ns))
                    for path, (size, mtime_ns) in raw["files"].items()
                },
                md5={str(path): str(digest) for path, digest in raw["md5"].items()},
                pieces=pieces,
                is_writing=bool(raw.get("writing", False)),
                boot=str(raw.get("boot", "")),
                # What is older says nothing of it, and was written long ago.
                synced=_pieces(str(raw["synced"])) if "synced" in raw else pieces,
            )
        except FileNotFoundError:
            return Record()
        except (ValueError, KeyError, TypeError, AttributeError):
            return Record()

    def written_ns(self) -> int:
        """When the record was written, by the clock that gives files their times; 0 without one."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0

    def write(self, record: Record) -> None:
        """Replaces the record."""
        files = {path: [file.size, file.mtime_ns] for path, file in record.files.items()}
        raw = {
            "version": RECORD_VERSION,
            "complete": record.complete,
            "files": files,
            "md5": dict(record.md5),
            "pieces": _runs(record.pieces),
            "writing": record.is_writing,
            "boot": record.boot,
            "synced": _runs(record.synced),
        }
        replace_file(self._path, json.dumps(raw, indent=1).encode())


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
        do = "make room" if kind is DiskFullError else "make the folder writable or name another"
        raise kind(
            f"{path} could not be written ({error.strerror}): {do}, and run it again"
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
