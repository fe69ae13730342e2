"""Whether a token goes through every stage: asked often, measured seldom."""

import asyncio
import time
from collections.abc import Callable

from ...errors import MagnetarError
from .served_model import EngineLike

PROBE_TIMEOUT_S = 2.0
CACHE_S = 5.0


class Readiness:
    """Remembers the last probe of an engine for `CACHE_S`, but not beyond its end or return.

    Probes one at a time.
    """

    def __init__(self, engine: EngineLike, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._lock: asyncio.Lock | None = None
        self._measured_at = float("-inf")
        self._was_over = False
        self._probe_s: float | None = None
        self._reason = ""

    async def check(self) -> float:
        """Seconds that the last probe took.

        Raises:
            NotReady: it failed, or took longer than `PROBE_TIMEOUT_S`.
        """
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            is_old = self._clock() - self._measured_at >= CACHE_S
            if is_old or self._engine.stats().is_over != self._was_over:
                await self._measure()
        if self._probe_s is None:
            raise NotReady(self._reason)
        return self._probe_s

    async def _measure(self) -> None:
        self._was_over = self._engine.stats().is_over
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                self._probe_s = await self._engine.probe()
        except TimeoutError:
            self._probe_s = None
            self._reason = f"no token came through every stage within {PROBE_TIMEOUT_S:g} s"
        except MagnetarError as error:
            self._probe_s = None
            self._reason = str(error)
        self._measured_at = self._clock()


class NotReady(Exception):
    """The model does not answer; the message says why."""
