"""Pipelines that come back: any thread tells of one, requests wait for it in an event loop."""

import asyncio
import contextlib
import threading


class Returns:
    """A count of what came back so far, and the requests that wait for it to grow. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def count(self) -> int:
        """To be read before one looks whom there is, and given to `later_than`."""
        with self._lock:
            return self._count

    @property
    def num_waiting(self) -> int:
        """Requests that wait now."""
        with self._lock:
            return len(self._waiting)

    def tell(self) -> None:
        """Something has changed: let everybody look again."""
        with self._lock:
            self._count += 1
            waiting, self._waiting = self._waiting, set()
        for change in waiting:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                change.get_loop().call_soon_threadsafe(_settle, change)

    async def later_than(self, count: int, *, timeout_s: float) -> bool:
        """Whether the count is above `count`, now or within the time."""
        change = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._count > count:
                return True
            self._waiting.add(change)
        try:
            async with asyncio.timeout(timeout_s):
                await change
        except TimeoutError:
            return False
        finally:
            with self._lock:
                self._waiting.discard(change)
        return True


def _settle(change: asyncio.Future[None]) -> None:
    if not change.done():
        change.set_result(None)
