"""SHA-256 of the tensors of a release folder, believed while its files look as they did."""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .file_bytes import read_exactly
from .manifest import Manifest, ManifestFile
from .piece_map import ByteRange
from .record import fingerprints
from .store import Store

CHUNK_BYTES = 16 << 20


class FolderSums:
    """What a store knows about one folder that lies elsewhere. Thread-safe."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._folder = folder
        self._file = ManifestFile(store.folder_manifest(folder))
        self._lock = threading.Lock()

    def known(self) -> Manifest:
        """The sums in files that look as they did then."""
        with self._lock:
            return self._unchanged()

    def keep(self, sums: Mapping[ByteRange, str]) -> None:
        """Keeps the sums, and what the files look like now."""
        with self._lock:
            known = self._unchanged().merged(sums)
            files = fingerprints(self._folder, {part.file for part in known.sums})
            self._file.write(replace(known, files=files))

    def compute(self, stop: threading.Event) -> None:
        """Reads every tensor that has no sum, and keeps its sum; ends early when `stop` is set.

        Raises:
            ReleaseError: the folder is no release that can be read.
        """
        from .checkpoint.release import FolderReader, stored_tensors

        known = self.known().sums
        found: dict[ByteRange, str] = {}
        buffer = bytearray(CHUNK_BYTES)
        for tensor in stored_tensors(FolderReader(self._folder)):
            part = ByteRange(tensor.file, tensor.offset, tensor.num_bytes)
            if part in known:
                continue
            digest = hashlib.sha256()
            for offset in range(part.offset, part.end, CHUNK_BYTES):
                if stop.is_set():
                    return
                view = memoryview(buffer)[: min(CHUNK_BYTES, part.end - offset)]
                read_exactly(self._folder / part.file, offset, view)
                digest.update(view)
            found[part] = digest.hexdigest()
        if found:
            self.keep(found)

    def _unchanged(self) -> Manifest:
        manifest = self._file.read()
        return manifest.unchanged(fingerprints(self._folder, manifest.files))
