"""Keeps one pipeline up: watches it, and starts it again whenever it is lost."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, Protocol

from ...errors import InterruptedByUserError, MagnetarError
from .health import NODE_PATIENCE_S, PipelineHealth
from .restart_policy import Restarts

WATCH_S: Final = 0.5
NODES_S: Final = 1.0
"""Between two looks whether the nodes of a lost pipeline are there."""

logger = logging.getLogger(__name__)


class KeptPipeline(Protocol):
    """What a keeper needs of a pipeline. Blocking; errors are `MagnetarError`s."""

    def lost(self, timeout_s: float) -> MagnetarError | None:
        """What ended it, if that happens within the time."""

    def clear(self) -> None:
        """End what is left of it; fine if there is nothing."""

    def missing(self) -> tuple[str, ...]:
        """Its nodes that are not there now."""

    def start(self) -> None:
        """Start it as it was planned, until it serves. After `clear`.

        Raises:
            InterruptedByUserError: the deployment is being stopped.
            MagnetarError: whatever kept it from that; some of it may have been started.
        """


class PipelineKeeper:
    """One thread, which owns the restarts of one pipeline from when it serves until `stop`."""

    def __init__(
        self,
        number: int,
        pipeline: KeptPipeline,
        *,
        on_change: Callable[[PipelineHealth], None],
        stop: threading.Event,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        """`on_change` hears of every step, in this thread. `wait` is `stop.wait`, or a fake."""
        self._number = number
        self._pipeline = pipeline
        self._on_change = on_change
        self._stop = stop
        self._clock = clock
        self._wait = wait or stop.wait
        self._restarts = Restarts(since_s=clock())
        self._since = _now()
        self._cause = self._obstacle = ""
        self._thread = threading.Thread(target=self.run, name=f"keeper-{number}")

    @property
    def health(self) -> PipelineHealth:
        """How the pipeline is now."""
        return PipelineHealth(
            number=self._number,
            state=self._restarts.state,
            since=self._since,
            num_restarts=self._restarts.num_restarts,
            num_failures=self._restarts.num_failures,
            is_looping=self._restarts.is_looping,
            cause=self._cause,
            obstacle=self._obstacle,
        )

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end, which `stop` brings soon."""
        self._thread.join()

    def run(self) -> None:
        """The thread's work."""
        try:
            while not self._stop.is_set():
                if (cause := self._pipeline.lost(WATCH_S)) is not None:
                    self._bring_back(cause)
        except InterruptedByUserError:
            pass  # the deployment ends, and with it all of this

    def _bring_back(self, cause: MagnetarError) -> None:
        while True:
            self._lose(cause)
            self._pipeline.clear()
            self._pause(self._restarts.due_s - self._clock())
            self._await_nodes()
            self._restarts = self._restarts.begun(self._clock())
            self._tell()
            try:
                self._pipeline.start()
            except InterruptedByUserError:
                raise
            except MagnetarError as error:
                cause = error
            except Exception as error:  # a defect; the next start may still succeed
                logger.exception("pipeline %d could not be started", self._number)
                cause = MagnetarError(f"{type(error).__name__}: {error}")
            else:
                self._restarts = self._restarts.done(self._clock())
                self._since, self._obstacle = _now(), ""
                self._tell()
                return

    def _lose(self, cause: MagnetarError) -> None:
        if self._restarts.state == "up":
            self._since, self._cause = _now(), str(cause)
        else:
            self._obstacle = str(cause)
        self._restarts = self._restarts.lost(self._clock())
        logger.warning(
            "pipeline %d is down (failure %d in a row): %s",
            self._number,
            self._restarts.num_failures,
            cause,
        )
        self._tell()

    def _await_nodes(self) -> None:
        """A node that is away is no failure: there is nothing to try until it is back."""
        until_s = self._clock() + NODE_PATIENCE_S
        told: tuple[tuple[str, ...], bool] | None = None
        while missing := self._pipeline.missing():
            news = (missing, self._clock() < until_s)
            if news != told:
                self._tell(missing=missing, is_patient=news[1])
                told = news
            self._pause(NODES_S)

    def _pause(self, seconds: float) -> None:
        if self._wait(max(seconds, 0.0)):
            raise InterruptedByUserError("stopped")

    def _tell(self, *, missing: tuple[str, ...] = (), is_patient: bool = True) -> None:
        self._on_change(replace(self.health, missing=missing, is_patient=is_patient))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
