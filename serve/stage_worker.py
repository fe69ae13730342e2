"""The loop of a stage process: receive a step, compute it, pass it on.

Three threads, so that the next step arrives and the last one leaves while this one is computed:
`receive`, `compute` and `send`, joined by short queues. When a link dies the worker closes both of
its links; the news travels around the ring until it reaches the engine.
"""

import json
import logging
import queue
import threading
from typing import Protocol

import torch

from ..cluster.link import Frame, StageLink
from ..errors import StageLostError
from .step import StepPlan, StepResult
from .step_codec import decode_plan, encode_result

logger = logging.getLogger(__name__)

_QUEUE_FRAMES = 4
_JOIN_S = 10.0


class Executor(Protocol):
    """What the worker needs of a `Stage`."""

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        """See `Stage.step`."""
        ...


class StageWorker:
    """Runs one stage between the neighbour that sends steps and the one that takes them."""

    def __init__(self, stage: Executor, *, upstream: StageLink, downstream: StageLink) -> None:
        self._stage = stage
        self._upstream = upstream
        self._downstream = downstream
        self._arrived: queue.Queue[Frame | None] = queue.Queue(_QUEUE_FRAMES)
        self._computed: queue.Queue[Frame | None] = queue.Queue(_QUEUE_FRAMES)
        self._threads = [
            threading.Thread(target=target, name=f"stage-{name}", daemon=True)
            for name, target in (
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
        return all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Close the links and wait until the step that is being computed is over."""
        self._close_links()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(_JOIN_S)

    def _receive(self) -> None:
        try:
            while True:
                self._arrived.put(self._upstream.receive())
        except StageLostError as error:
            logger.info("no more steps: %s", error)
        finally:
            self._arrived.put(None)

    def _compute(self) -> None:
        try:
            while (frame := self._arrived.get()) is not None:
                self._computed.put(self._execute(frame))
        finally:
            self._computed.put(None)

    def _execute(self, frame: Frame) -> Frame:
        if frame.kind != "step":
            return frame  # an error of a stage before this one, on its way to the engine
        try:
            plan = decode_plan(frame.step_id, frame.body)
            output = self._stage.step(plan, frame.tensor)
        except Exception as error:  # whatever it is, the engine must hear of it
            logger.exception("step %d failed", frame.step_id)
            return Frame(
                kind="error",
                epoch=frame.epoch,
                step_id=frame.step_id,
                body=json.dumps(f"{type(error).__name__}: {error}").encode(),
            )
        if isinstance(output, StepResult):
            return Frame(
                kind="result",
                epoch=frame.epoch,
                step_id=frame.step_id,
                body=encode_result(output),
            )
        return Frame(
            kind="step",
            epoch=frame.epoch,
            step_id=frame.step_id,
            body=frame.body,
            tensor=output,
        )

    def _send(self) -> None:
        while (frame := self._computed.get()) is not None:
            try:
                self._downstream.send(frame)
            except StageLostError as error:
                # Go on taking what is computed, so that the other two threads come to their end.
                logger.info("cannot pass steps on: %s", error)
                self._close_links()
        self._close_links()

    def _close_links(self) -> None:
        self._upstream.close()
        self._downstream.close()
