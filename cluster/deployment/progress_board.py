"""The latest progress of every phase and node, for readers that come by now and then."""

import threading

from ...fetcher.progress import Phase, Progress


class ProgressBoard:
    """Keeps one reading for each (phase, node): bounded, and no `finished` is ever lost.

    Thread-safe. `publish` is a `ProgressSink`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[tuple[Phase, str], tuple[int, Progress]] = {}
        self._count = 0

    def publish(self, progress: Progress) -> None:
        """Replace the reading of its phase and node."""
        with self._lock:
            self._count += 1
            self._latest[progress.phase, progress.node] = (self._count, progress)

    def since(self, cursor: int) -> tuple[tuple[Progress, ...], int]:
        """Readings newer than `cursor`, oldest first, and the cursor for the next time."""
        with self._lock:
            news = sorted(
                (entry for entry in self._latest.values() if entry[0] > cursor),
                key=lambda entry: entry[0],
            )
            return tuple(progress for _, progress in news), self._count
