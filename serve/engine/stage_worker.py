"""The loop of a stage process: receive a step, compute it, pass it on.

Handing a frame from one thread to another costs as much as its way from process to process. So the
thread that computes also receives, and sends what the link takes at once; two others keep receiving
and sending going while a step takes long to compute, or a frame to send.

What ends one of them ends the worker, and travels down the ring as an error frame, so that the
engine hears the reason and not only that a link is dead.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from typing import TYPE_CHECKING, Protocol

from ...cluster.links.frame import Frame
from ...cluster.links.link import ALIVE_S, SILENCE_S, StageLink
from ...errors import MagnetarError, StageLostError
from .step import StepPlan, StepResult
from .step_codec import (
    Known,
    decode_error,
    decode_plan,
    encode_error,
    encode_result,
    encode_traffic,
)
from .worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

logger = logging.getLogger(__name__)

_LONG_STEP_S = 0.2
"""After that frames are received ahead. What comes before waits in the kernel, which has room for a
chunk or two of a prompt; but TCP gives up a link that stays full."""
_AT_ONCE_BYTES = 256 << 10
"""The buffers of a link take so much without waiting for the peer, if nothing is before it."""


class Executor(Protocol):
    """What the worker needs of a `Stage`."""

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        """See `Stage.step`; the tensor it returns is not written to afterwards."""
        ...


class StageWorker(Worker):
    """Runs one stage between the neighbour that sends steps and the one that takes them.

    It takes both links over and closes them at its end.
    """

    def __init__(
        self,
        stage: Executor,
        *,
        upstream: StageLink,
        downstream: StageLink,
        name: str = "a stage",
        expert_tokens: Callable[[], Mapping[int, Sequence[int]]] | None = None,
    ) -> None:
        """`name` is what errors call the stage.

        `expert_tokens`, as `Stage.expert_tokens`, is told to the engine now and then.
        """
        self._stage = stage
        self._upstream = upstream
        self._downstream = downstream
        self._name = name
        # Unbounded in type only: they hold no more than the steps in flight, one for each stage and
        # one more, and the word that ends them.
        self._arrived: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._unsent: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._long_from = math.inf
        """When the step in the making will have taken long."""
        self._receives_ahead = False
        self._waits = False
        """The computing thread is out of work while the other receives."""
        self._num_unsent = 0
        """Frames that the sender has not sent yet, the one in its hands included."""
        self._expert_tokens = expert_tokens
        self._traffic_told: Mapping[int, Sequence[int]] = {}
        self._traffic_due = time.monotonic()
        self._sending = threading.Lock()
        loops = {"compute": self._compute, "receive": self._receive_ahead, "send": self._send}
        super().__init__("stage", loops)

    def _compute(self) -> None:
        known: Known = {}
        while (frame := self._next()) is not None and not self._ending.is_set():
            self._long_from = time.monotonic() + _LONG_STEP_S
            try:
                plan = decode_plan(frame.step_id, frame.body, known)
            except ValueError as error:
                self._fail(f"{self._name} lost the one before it: {error}")
                return
            try:
                output = self._stage.step(plan, frame.tensor)
            except Exception as error:  # whatever it is, the engine must hear of it
                logger.exception("%s failed at step %d", self._name, plan.step_id)
                what = str(error) if isinstance(error, MagnetarError) else repr(error)
                self._fail(f"{self._name} failed at step {plan.step_id}: {what}")
                return
            self._pass_on(_frame_of(output, frame))

    def _next(self) -> Frame | None:
        """The next step; None at the end."""
        with self._lock:
            self._long_from = math.inf
            none_ahead = self._arrived.empty()
            self._waits = none_ahead and self._receives_ahead
            receives = none_ahead and not self._receives_ahead
        return self._receive() if receives else self._arrived.get()

    def _receive_ahead(self) -> None:
        """Receive while a step takes long, and still bring the frame that is waited for by then."""
        while not self._ending.wait(_LONG_STEP_S):
            with self._lock:
                self._receives_ahead = self._is_long()
            while self._receives_ahead:
                frame = self._receive()
                with self._lock:
                    self._arrived.put(frame)
                    self._receives_ahead = not self._waits and self._is_long()
                    self._waits = False
                if frame is None:
                    return

    def _is_long(self) -> bool:
        return time.monotonic() >= self._long_from

    def _receive(self) -> Frame | None:
        """The next step; None when there is none any more, for a reason that is on its way."""
        try:
            while (frame := self._upstream.receive(SILENCE_S)).kind == "traffic":
                self._leave_to_sender(frame)
            if frame.kind == "step":
                return frame
            if frame.kind != "error":
                raise ValueError(f"it sent a {frame.kind} to a stage")
            # A stage before this one failed; what it says is all that still matters.
            self._leave_to_sender(frame)
        except TimeoutError as error:
            self._fail(f"{self._name}: {error} for {SILENCE_S:g} s")
        except (StageLostError, ValueError) as error:
            self._fail(f"{self._name} lost the one before it: {error}")
        return None

    def _pass_on(self, frame: Frame) -> None:
        """Send a frame now if that is a moment's work, else leave it to the sender."""
        num_bytes = len(frame.body) + (0 if frame.tensor is None else frame.tensor.nbytes)
        if self._num_unsent or num_bytes > _AT_ONCE_BYTES:
            self._leave_to_sender(frame)
            return
        try:
            with self._sending:
                self._downstream.send(frame)
        except (StageLostError, ValueError) as error:
            self._lose_downstream(error)

    def _send(self) -> None:
        """Large frames, errors, and signs of life."""
        try:
            while not self._ending.is_set():
                try:
                    frame = self._unsent.get(timeout=ALIVE_S)
                except queue.Empty:
                    with self._sending:
                        self._downstream.send_alive()
                    self._tell_traffic()
                    continue
                if frame is None:
                    return
                with self._sending:
                    self._downstream.send(frame)
                with self._lock:
                    self._num_unsent -= 1
                if frame.kind == "error":
                    self._keep(StageLostError(decode_error(frame.body)))
                    return
                self._tell_traffic()
        except (StageLostError, ValueError) as error:
            self._lose_downstream(error)
        finally:
            self._end()

    def _tell_traffic(self) -> None:
        """Send on how often experts were chosen, if that is news and the last was a while ago."""
        now = time.monotonic()
        if self._expert_tokens is None or now < self._traffic_due:
            return
        self._traffic_due = now + ALIVE_S
        expert_tokens = self._expert_tokens()
        if expert_tokens != self._traffic_told:
            self._traffic_told = expert_tokens
            body = encode_traffic(expert_tokens)
            frame = Frame(kind="traffic", epoch=self._downstream.epoch, step_id=0, body=body)
            with self._sending:
                self._downstream.send(frame)

    def _leave_to_sender(self, frame: Frame) -> None:
        with self._lock:
            self._num_unsent += 1
        self._unsent.put(frame)

    def _lose_downstream(self, error: Exception) -> None:
        self._keep(StageLostError(f"{self._name} lost the one after it: {error}"))
        self._end()

    def _fail(self, message: str) -> None:
        """Remember what ended the worker, and let the sender tell it as its last word."""
        if self._ending.is_set():
            return  # closing the links is what made them fail
        self._keep(StageLostError(message))
        self._leave_to_sender(
            Frame(kind="error", epoch=self._downstream.epoch, step_id=0, body=encode_error(message))
        )

    def _release(self) -> None:
        self._upstream.close()
        self._downstream.close()
        self._arrived.put(None)
        self._unsent.put(None)


def _frame_of(output: torch.Tensor | StepResult, came: Frame) -> Frame:
    """What a stage passes on; the next one gets the very bytes of the plan that came."""
    if isinstance(output, StepResult):
        return Frame(
            kind="result", epoch=came.epoch, step_id=came.step_id, body=encode_result(output)
        )
    return Frame(kind="step", epoch=came.epoch, step_id=came.step_id, body=came.body, tensor=output)
