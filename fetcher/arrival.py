"""Which pieces of a release may be read: one thread tells, any thread waits."""

import threading
from collections.abc import Collection


class Arrival:
    """Pieces that are verified and in the files, not in a write queue. Thread-safe."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._pieces: frozenset[int] = frozenset()

    def tell(self, pieces: frozenset[int]) -> None:
        """Those that may be read from now on; one that was told before and is missing, no more."""
        with self._condition:
            self._pieces = pieces
            self._condition.notify_all()

    def wait(self, pieces: Collection[int], timeout_s: float) -> bool:
        """Whether all of these may be read, now or within the time."""
        with self._condition:
            return self._condition.wait_for(lambda: self._pieces.issuperset(pieces), timeout_s)
