"""What the workers of stages and helpers share: threads that begin and end together."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from ...errors import MagnetarError


class Worker(ABC):
    """Loops in threads of their own, of which whatever ends one ends all. A worker runs once."""

    def __init__(self, kind: str, loops: Mapping[str, Callable[[], None]]) -> None:
        """The thread of the loop `what` is called ``kind-what``."""
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._error: MagnetarError | None = None
        self._threads = [
            threading.Thread(target=loop, name=f"{kind}-{what}", daemon=True)
            for what, loop in loops.items()
        ]

    def start(self) -> None:
        """Begin to serve."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Whether all loops still run."""
        return not self._ending.is_set() and all(thread.is_alive() for thread in self._threads)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when `timeout_s` passes first, True after `stop`.

        Raises:
            MagnetarError: what ended the worker otherwise.
        """
        if not self._ending.wait(timeout_s):
            return False
        if self._error is not None:
            raise self._error
        return True

    def stop(self) -> None:
        """Close the links, and wait until what is being computed is done."""
        self._end()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @abstractmethod
    def _release(self) -> None:
        """Close the links and wake the loops; called at the end, perhaps more than once."""

    def _keep(self, error: MagnetarError) -> None:
        """The first error is the cause; those after the end are not errors."""
        with self._lock:
            if self._error is None and not self._ending.is_set():
                self._error = error

    def _end(self) -> None:
        """End all loops."""
        with self._lock:
            self._ending.set()
        self._release()
