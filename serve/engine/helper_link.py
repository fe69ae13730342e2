"""What a stage and one of its helpers say to each other: rows out, outputs of experts back.

One request for a layer holds all rows for that helper, and is answered before the next is sent.
The step id of these frames counts requests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...cluster.links.frame import Frame
from ...cluster.links.link import SILENCE_S, StageLink
from ...errors import StageLostError
from .step_codec import decode_error

if TYPE_CHECKING:
    import torch


class HelperLink:
    """The stage's end, a `RemoteExperts`; it takes the link over."""

    def __init__(self, link: StageLink, *, name: str) -> None:
        """`name` is what errors call the helper."""
        self.name = name
        self._link = link
        self._num_sent = 0
        self._expected = (0, 0)

    def send(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> None:
        """See `RemoteExperts.send`."""
        self._num_sent += 1
        self._expected = (len(rows_A), x_RC.shape[1])
        frame = Frame(
            kind="rows",
            epoch=self._link.epoch,
            step_id=self._num_sent,
            body=encode_request(layer_id, rows_A, experts_A),
            tensor=x_RC.cpu(),
        )
        try:
            self._link.send(frame)
        except StageLostError as error:
            raise StageLostError(f"{self.name} is lost: {error}") from error

    def receive(self) -> torch.Tensor:
        """See `RemoteExperts.receive`."""
        try:
            frame = self._link.receive(SILENCE_S)
            failure = decode_error(frame.body) if frame.kind == "error" else None
        except TimeoutError as error:
            raise StageLostError(f"{self.name}: {error} for {SILENCE_S:g} s") from error
        except (StageLostError, ValueError) as error:
            raise StageLostError(f"{self.name} is lost: {error}") from error
        if failure is not None:
            raise StageLostError(f"{self.name} failed: {failure}")
        y_AC = frame.tensor
        if (
            (frame.kind, frame.step_id) != ("outputs", self._num_sent)
            or y_AC is None
            or y_AC.shape != self._expected
        ):
            raise StageLostError(f"{self.name} answers what was not asked")
        return y_AC

    def close(self) -> None:
        """End the helper's work; wakes whoever waits in `receive`."""
        self._link.close()


def encode_request(layer_id: int, rows_A: Sequence[int], experts_A: Sequence[int]) -> bytes:
    """The layer, then for each output that is wanted its row and its expert."""
    numbers = (layer_id, *rows_A, *experts_A)
    return struct.pack(f"<{len(numbers)}I", *numbers)


def decode_request(body: bytes, *, num_rows: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The inverse of `encode_request`; ValueError for anything else, or a row beyond `num_rows`."""
    num_outputs, odd = divmod(len(body) - 4, 8)
    if num_outputs < 1 or odd:
        raise ValueError(f"a request of {len(body)} bytes is none")
    layer_id, *numbers = struct.unpack(f"<{1 + 2 * num_outputs}I", body)
    rows_A, experts_A = tuple(numbers[:num_outputs]), tuple(numbers[num_outputs:])
    if max(rows_A) >= num_rows:
        raise ValueError(f"a request for row {max(rows_A)} of {num_rows}")
    return layer_id, rows_A, experts_A
