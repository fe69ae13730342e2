"""Memory that a run finds ready.

A virtual machine gives memory that nobody uses back to its host, and getting it again costs more
than filling it. So the same transfer took 0.3 or 1.0 s of the system's time by how long ago the run
before it had ended. Here as many pages of files as it fills are in memory before each run, and are
let go of at the moment when its transfer begins.
"""

import os
from pathlib import Path
from typing import Final

_CHUNK_BYTES: Final = 1 << 24


class WarmMemory:
    """So much of it is held by a file from `fill` to `release`."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path = path
        self._num_bytes = num_bytes

    def fill(self) -> None:
        """Takes it and writes to all of it."""
        chunk = os.urandom(_CHUNK_BYTES)
        with self._path.open("wb") as file:
            for _ in range(0, self._num_bytes, _CHUNK_BYTES):
                file.write(chunk)

    def release(self) -> None:
        """Leaves it to whoever asks next; for any thread."""
        self._path.unlink(missing_ok=True)
