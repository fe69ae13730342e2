"""Which pieces would be on the disk if the machine lost power now."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

SYNC_S: Final = 30.0
"""How often files are synced while they are written: about when the system does it anyway."""


class Syncing:
    """Syncs the files of one download, in a thread of its own; for one other thread."""

    def __init__(
        self,
        paths: Callable[[], Iterable[Path]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = paths
        self._clock = clock
        self._began_s = float("-inf")
        self._thread: threading.Thread | None = None
        self._pieces: frozenset[int] = frozenset()

    @property
    def pieces(self) -> frozenset[int]:
        """Those that are known to be on the disk."""
        return self._pieces

    def restart(self, pieces: frozenset[int]) -> None:
        """Starts from what earlier runs knew."""
        self._wait()
        self._pieces = pieces
        self._began_s = self._clock()

    def keep_up(self, pieces: frozenset[int], *, now: bool = False) -> None:
        """These pieces were written to the files; begins to sync them if it is time, or `now`."""
        is_busy = self._thread is not None and self._thread.is_alive()
        if not is_busy and (now or self._clock() - self._began_s >= SYNC_S):
            self._begin(pieces)

    def finish(self, pieces: frozenset[int]) -> None:
        """Blocks until these pieces are on the disk, as far as the disk takes them."""
        self._wait()
        if not pieces <= self._pieces:
            self._begin(pieces)
            self._wait()

    def _begin(self, pieces: frozenset[int]) -> None:
        self._began_s = self._clock()
        self._thread = threading.Thread(target=self._sync, args=(pieces,), name="store-sync")
        self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _sync(self, pieces: frozenset[int]) -> None:
        # What cannot be synced is only not known to be there.
        with contextlib.suppress(OSError):
            for path in self._paths():
                with contextlib.suppress(FileNotFoundError):
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    try:
                        os.fdatasync(file)
                    finally:
                        os.close(file)
            self._pieces = pieces
