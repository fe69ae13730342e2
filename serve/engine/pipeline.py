"""The ring of stages as the engine sees it: plans go in at one end, results come out at the other.

Links and stages keep the order of steps, so results come in the order of the plans.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...cluster.links.link import ALIVE_S, SILENCE_S, Frame, StageLink
from ...errors import StageLostError
from .step import StepPlan, StepResult
from .step_codec import Known, decode_error, decode_result, decode_traffic, encode_plan

STALL_S = 600.0
"""A ring that brings no result for so long is lost, although its links live. The longest steps are
chunks of a prompt: minutes for a large model on few cores."""

_CAUSE_S = 2.0
"""How long to wait for the cause of a broken link: an error frame passes the ring in a moment."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A result that came out of the ring."""

    result: StepResult
    at: float
    """When, on the pipeline's clock."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a stage tells of its experts now and then: by layer, the tokens for each so far."""

    expert_tokens: Mapping[int, tuple[int, ...]]


class Pipeline:
    """Both links of the engine, which it takes over. One thread calls the methods."""

    def __init__(
        self,
        *,
        downstream: StageLink,
        upstream: StageLink,
        on_arrival: Callable[[Arrival | Traffic | StageLostError], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_arrival` runs in the receiving thread and must not block; an error comes last."""
        self._downstream = downstream
        self._upstream = upstream
        self._on_arrival = on_arrival
        self._clock = clock
        self._known: Known = {}
        self._sent_at: deque[float] = deque()
        self._last_sent_at = clock()
        self._last_result_at = clock()
        self._failure: queue.Queue[StageLostError] = queue.Queue(1)
        self._thread = threading.Thread(target=self._receive, name="engine-receive", daemon=True)

    def start(self) -> None:
        """Begin to receive."""
        self._thread.start()

    def send(self, plan: StepPlan) -> None:
        """Send a step to the first stage.

        Raises:
            StageLostError: the ring is broken; the message is the cause where a stage tells it.
        """
        frame = Frame(
            kind="step",
            epoch=self._downstream.epoch,
            step_id=plan.step_id,
            body=encode_plan(plan, self._known),
        )
        self._last_sent_at = self._clock()
        self._sent_at.append(self._last_sent_at)
        self._guard(lambda: self._downstream.send(frame))

    def took(self, arrival: Arrival) -> float:
        """Seconds from the sending of a step to its result; to be asked once for each, in order."""
        self._last_result_at = arrival.at
        return arrival.at - self._sent_at.popleft()

    def check(self) -> None:
        """Tell the first stage that we live, if it is time. To be called every `ALIVE_S`.

        Raises:
            StageLostError: the ring is broken, or no result came for `STALL_S`.
        """
        now = self._clock()
        if self._sent_at and now - max(self._sent_at[0], self._last_result_at) > STALL_S:
            raise StageLostError(f"no step came back from the stages for {STALL_S:g} s")
        if now - self._last_sent_at >= ALIVE_S:
            self._last_sent_at = now
            self._guard(self._downstream.send_alive)

    def close(self) -> None:
        """Close the links and wait for the thread."""
        self._downstream.close()
        self._upstream.close()
        if self._thread.ident is not None:
            self._thread.join()

    def _guard(self, send: Callable[[], None]) -> None:
        """A stage that fails closes its links but first tells why, all the way around the ring."""
        try:
            send()
        except StageLostError as error:
            try:
                raise self._failure.get(timeout=_CAUSE_S) from error
            except queue.Empty:
                raise StageLostError(f"the engine lost the first stage: {error}") from error

    def _receive(self) -> None:
        try:
            while True:
                frame = self._upstream.receive(SILENCE_S)
                if frame.kind == "error":
                    raise StageLostError(decode_error(frame.body))
                if frame.kind == "traffic":
                    self._on_arrival(Traffic(decode_traffic(frame.body)))
                    continue
                if frame.kind != "result":
                    raise ValueError(f"it sent a {frame.kind} to the engine")
                result = decode_result(frame.step_id, frame.body)
                self._on_arrival(Arrival(result, self._clock()))
        except TimeoutError as error:
            self._lose(StageLostError(f"the last stage is silent: {error} for {SILENCE_S:g} s"))
        except ValueError as error:
            self._lose(StageLostError(f"the engine does not understand the last stage: {error}"))
        except StageLostError as error:
            self._lose(error)

    def _lose(self, error: StageLostError) -> None:
        self._failure.put(error)
        self._on_arrival(error)
