"""The ring of stages as the engine sees it: plans go in at one end, results come out at the other.

Links and stages keep the order of steps, so results come in the order of the plans.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...cluster.links.bell import Bell
from ...cluster.links.frame import Frame
from ...cluster.links.link import ALIVE_S, SILENCE_S, StageLink
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
    """Both links of the engine, which it takes over. One thread calls all methods but `wake`."""

    def __init__(
        self,
        *,
        downstream: StageLink,
        upstream: StageLink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._downstream = downstream
        self._upstream = upstream
        self._bell = Bell()
        self._clock = clock
        self._known: Known = {}
        self._sent_at: deque[float] = deque()
        self._last_sent_at = clock()
        self._last_result_at = clock()

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

    def receive(self, timeout_s: float) -> Arrival | Traffic | None:
        """What comes out of the ring next; None when nothing does in time, or at `wake`.

        Raises:
            StageLostError: the ring is broken; the message is the cause where a stage tells it.
        """
        try:
            if not self._upstream.wait(timeout_s, self._bell):
                return None
            frame = self._upstream.receive(SILENCE_S)
            if frame.kind == "result":
                return Arrival(decode_result(frame.step_id, frame.body), self._clock())
            if frame.kind == "traffic":
                return Traffic(decode_traffic(frame.body))
            if frame.kind != "error":
                raise ValueError(f"it sent a {frame.kind} to the engine")
            raise StageLostError(decode_error(frame.body))
        except TimeoutError as error:
            raise StageLostError(
                f"the last stage is silent: {error} for {SILENCE_S:g} s"
            ) from error
        except ValueError as error:
            raise StageLostError(
                f"the engine does not understand the last stage: {error}"
            ) from error

    def wake(self) -> None:
        """End the `receive` of now, or the next. Any thread may."""
        self._bell.ring()

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
        """Close the links."""
        self._downstream.close()
        self._upstream.close()
        self._bell.close()

    def _guard(self, send: Callable[[], None]) -> None:
        """A stage that fails closes its links but first tells why, all the way around the ring."""
        try:
            send()
        except StageLostError as error:
            until = time.monotonic() + _CAUSE_S
            while (left_s := until - time.monotonic()) > 0:
                self.receive(left_s)
            raise StageLostError(f"the engine lost the first stage: {error}") from error
