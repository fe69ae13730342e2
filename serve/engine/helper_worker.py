"""The loop of a helper process: receive rows, compute their experts, send the outputs back."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Protocol

from ...cluster.links.frame import Frame
from ...cluster.links.link import ALIVE_S, StageLink
from ...errors import MagnetarError, StageLostError
from .helper_link import decode_request
from .step_codec import decode_error, encode_error
from .worker import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

logger = logging.getLogger(__name__)


class ExpertExecutor(Protocol):
    """What the worker needs of a `Helper`."""

    def outputs(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> torch.Tensor:
        """See `Helper.outputs`."""
        ...


class HelperWorker(Worker):
    """Serves one stage until it closes the link, which the worker takes over.

    One thread receives, computes and sends: the stage waits for the answer, and every hand-over
    between threads would be added to its time. Another one tells the stage that we live while it
    waits; a stage that asks nothing expects no sign of life.
    """

    def __init__(self, helper: ExpertExecutor, *, link: StageLink, name: str) -> None:
        """`name` is what errors call the helper."""
        self._helper = helper
        self._link = link
        self._name = name
        self._is_asked = threading.Event()
        self._sending = threading.Lock()
        super().__init__("helper", {"serve": self._serve, "beat": self._beat})

    def _serve(self) -> None:
        try:
            while True:
                frame = self._link.receive()
                self._is_asked.set()
                answer = self._answer(frame)
                with self._sending:
                    self._is_asked.clear()
                    self._link.send(answer)
                if answer.kind == "error":
                    self._keep(StageLostError(f"{self._name}: {decode_error(answer.body)}"))
                    return
        except (StageLostError, ValueError) as error:
            self._keep(StageLostError(f"{self._name} lost its stage: {error}"))
        finally:
            self._end()

    def _answer(self, frame: Frame) -> Frame:
        """The outputs, or what the stage must hear instead."""
        try:
            if frame.kind != "rows" or frame.tensor is None:
                raise ValueError(f"a {frame.kind} came to a helper")
            layer_id, rows_A, experts_A = decode_request(frame.body, num_rows=len(frame.tensor))
            y_AC = self._helper.outputs(layer_id, frame.tensor, rows_A, experts_A)
        except Exception as error:  # whatever it is
            logger.exception("%s failed", self._name)
            what = str(error) if isinstance(error, MagnetarError) else repr(error)
            return Frame(
                kind="error", epoch=frame.epoch, step_id=frame.step_id, body=encode_error(what)
            )
        return Frame(kind="outputs", epoch=frame.epoch, step_id=frame.step_id, tensor=y_AC)

    def _beat(self) -> None:
        while not self._ending.wait(ALIVE_S):
            with self._sending:
                if self._is_asked.is_set() and not self._ending.is_set():
                    with contextlib.suppress(StageLostError):  # the other thread sees it too
                        self._link.send_alive()

    def _release(self) -> None:
        self._link.close()
