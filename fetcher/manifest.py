"""SHA-256 of tensors as they lie in the files of a release, computed when the bytes were right.

Against these a tensor is checked when it is loaded again: without the pieces around it, and where
there are no pieces at all, for a release folder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .piece_map import ByteRange
from .record import Fingerprint, replace_file

MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Byte ranges, usually of a tensor each, and the SHA-256 of their bytes as hex digits."""

    sums: Mapping[ByteRange, str] = field(default_factory=dict)
    files: Mapping[str, Fingerprint] = field(default_factory=dict)
    """Of a folder: what its files looked like. Those of a torrent can hold nothing else."""

    def merged(self, sums: Mapping[ByteRange, str]) -> "Manifest":
        """With these besides; they win."""
        return replace(self, sums={**self.sums, **sums})

    def unchanged(self, now: Mapping[str, Fingerprint]) -> "Manifest":
        """Only what lies in files that still look as they did."""
        same = {file for file, then in self.files.items() if now.get(file) == then}
        return Manifest(
            sums={part: digest for part, digest in self.sums.items() if part.file in same},
            files={file: self.files[file] for file in same},
        )


class ManifestFile:
    """A `Manifest` on disk; an unreadable one counts as none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Manifest:
        """What was written last, or an empty one."""
        try:
            raw = json.loads(self._path.read_bytes())
            if raw["version"] != MANIFEST_VERSION:
                return Manifest()
            return Manifest(
                sums={
                    ByteRange(str(file), int(offset), int(count)): str(digest)
                    for file, rows in raw["sha256"].items()
                    for offset, count, digest in rows
                },
                files={
                    str(file): Fingerprint(size=int(size), mtime_ns=int(mtime_ns))
                    for file, (size, mtime_ns) in raw["files"].items()
                },
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Manifest()

    def write(self, manifest: Manifest) -> None:
        """Replaces it. Raises DownloadError where the disk does not take it."""
        rows: dict[str, list[Any]] = {}
        for part in sorted(manifest.sums):
            row = [part.offset, part.num_bytes, manifest.sums[part]]
            rows.setdefault(part.file, []).append(row)
        files = {file: [then.size, then.mtime_ns] for file, then in manifest.files.items()}
        told = {"version": MANIFEST_VERSION, "files": files, "sha256": rows}
        replace_file(self._path, json.dumps(told).encode())
