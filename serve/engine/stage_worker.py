"""The loop of a stage process: receive a step, compute it, pass it on.

Three threads, so that the next step arrives and the last one leaves while this one is computed,
joined by short queues. What ends one of them ends the worker, and travels down the ring as an
error frame, so that the engine hears the reason and not only that a link is dead.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from typing import TYPE_CHECKING, Protocol, TypeVar

from ...cluster.link import ALIVE_S, SILENCE_S, Frame, StageLink
from ...errors import MagnetarError, StageLostError
from .step import StepPlan, StepResult
from .step_codec import Known, decode_error, decode_plan, encode_error, encode_result

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_QUEUED = 8
_RETRY_S = 0.5
_Item = TypeVar("_Item")


class Executor(Protocol):
    """What the worker needs of a `Stage`."""

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        """See `Stage.step`; the tensor it returns is not written to afterwards."""
        ...


class StageWorker:
    """Runs one stage between the neighbour that sends steps and the one that takes them.

    It takes both links over and closes them at its end. A worker runs once.
    """

    def __init__(
        self, stage: Executor, *, upstream: StageLink, downstream: StageLink, name: str = "a stage"
    ) -> None:
        """`name` is what errors call the stage."""
        self._stage = stage
        self._upstream = upstream
        self._downstream = downstream
        self._name = name
        self._arrived: queue.Queue[tuple[StepPlan, Frame] | None] = queue.Queue(_QUEUED)
        self._computed: queue.Queue[Frame | None] = queue.Queue(_QUEUED)
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._error: MagnetarError | None = None
        self._threads = [
            threading.Thread(target=target, name=f"stage-{what}", daemon=True)
            for what, target in (
                ("receive", self._receive),
                ("compute", self._compute),
                ("send", self._send),
            )
        ]

    def start(self) -> None:
        """Begin to execute steps."""
        for thread in self._threads:
            thread.start()

    def is_alive(self) -> bool:
        """Whether steps can still pass through."""
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
        """Close the links, and wait until the step that is being computed is over."""
        self._end()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _receive(self) -> None:
        known: Known = {}
        try:
            while True:
                frame = self._upstream.receive(SILENCE_S)
                if frame.kind == "error":
                    # A stage before this one failed; what it says is all that still matters.
                    self._put(self._computed, frame)
                    return
                if frame.kind != "step":
                    raise ValueError(f"it sent a {frame.kind} to a stage")
                plan = decode_plan(frame.step_id, frame.body, known)
                self._put(self._arrived, (plan, frame))
        except TimeoutError as error:
            self._fail(StageLostError(f"{self._name}: {error} for {SILENCE_S:g} s"))
        except (StageLostError, ValueError) as error:
            self._fail(StageLostError(f"{self._name} lost the one before it: {error}"))

    def _compute(self) -> None:
        while (item := self._arrived.get()) is not None and not self._ending.is_set():
            plan, frame = item
            try:
                output = self._stage.step(plan, frame.tensor)
            except Exception as error:  # whatever it is, the engine must hear of it
                logger.exception("%s failed at step %d", self._name, plan.step_id)
                what = str(error) if isinstance(error, MagnetarError) else repr(error)
                self._fail(StageLostError(f"{self._name} failed at step {plan.step_id}: {what}"))
                return
            self._put(self._computed, _frame_of(output, frame))

    def _send(self) -> None:
        try:
            while not self._ending.is_set():
                try:
                    frame = self._computed.get(timeout=ALIVE_S)
                except queue.Empty:
                    self._downstream.send_alive()
                    continue
                if frame is None:
                    return
                self._downstream.send(frame)
                if frame.kind == "error":
                    self._keep(StageLostError(decode_error(frame.body)))
                    return
        except (StageLostError, ValueError) as error:
            self._keep(StageLostError(f"{self._name} lost the one after it: {error}"))
        finally:
            self._end()

    def _fail(self, error: StageLostError) -> None:
        """Remember what ended the worker, and let the sender tell it as its last word."""
        if self._ending.is_set():
            return  # closing the links is what made them fail
        self._keep(error)
        self._put(
            self._computed,
            Frame(
                kind="error",
                epoch=self._downstream.epoch,
                step_id=0,
                body=encode_error(str(error)),
            ),
        )

    def _keep(self, error: StageLostError) -> None:
        """The first error is the cause; those after the end are not errors."""
        with self._lock:
            if self._error is None and not self._ending.is_set():
                self._error = error

    def _put(self, into: queue.Queue[_Item | None], item: _Item) -> None:
        """Wait for room, unless whoever would make it has ended."""
        while not self._ending.is_set():
            try:
                into.put(item, timeout=_RETRY_S)
            except queue.Full:
                continue
            return

    def _end(self) -> None:
        """Wake all threads for the last time."""
        with self._lock:
            self._ending.set()
        self._upstream.close()
        self._downstream.close()
        for waiting in (self._arrived, self._computed):
            with contextlib.suppress(queue.Full):  # then its reader is not waiting
                waiting.put_nowait(None)


def _frame_of(output: torch.Tensor | StepResult, came: Frame) -> Frame:
    """What a stage passes on; the next one gets the very bytes of the plan that came."""
    if isinstance(output, StepResult):
        return Frame(
            kind="result", epoch=came.epoch, step_id=came.step_id, body=encode_result(output)
        )
    return Frame(kind="step", epoch=came.epoch, step_id=came.step_id, body=came.body, tensor=output)
