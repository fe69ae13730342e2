"""What it takes to hand work over: a step to the worker of a stage, rows of a layer to a helper.

Who waits for work sleeps, and wakes the later the longer it slept: a message over loopback took
34 us there and back when one followed the other, 245 us when 10 ms lay between. So everything here
is measured with the pauses that real layers and steps make. Links are real, over loopback; what
they take by themselves, `way_s` (`loopback_s` measures it), is subtracted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Final

from ..cluster.inventory.link_probe import PAUSE_S
from ..cluster.inventory.pieces import timed_pieces, undisturbed_s
from ..cluster.links.dial import dial
from ..cluster.links.frame import Frame
from ..cluster.links.link import TcpLink
from ..cluster.links.listener import LinkListener
from ..errors import StageLostError
from .engine.helper import Helper
from .engine.helper_link import HelperLink
from .engine.helper_worker import HelperWorker
from .engine.stage_worker import StageWorker
from .engine.step_codec import decode_error, encode_plan
from .small_model import Noise, small_config, small_stage, small_step

if TYPE_CHECKING:
    import torch

    from ..cluster.machines import ComputeDtype
    from .engine.stage import Stage

_LAYERS: Final = 2
_SECRET: Final = bytes(32)
_TIMEOUT_S: Final = 10.0


def worker_s(stage: Stage, *, way_s: float) -> float:
    """Seconds of a step through the worker of a stage, beside the way to it and back."""
    with _link() as (ours, its_upstream), _link() as (its_downstream, back):
        worker = StageWorker(stage, upstream=its_upstream, downstream=its_downstream)
        worker.start()

        positions = count()

        def once() -> None:
            position = next(positions)
            body = encode_plan(small_step(position))
            ours.send(Frame(kind="step", epoch=0, step_id=position, body=body))
            while (frame := back.receive(_TIMEOUT_S)).kind != "result":  # some tell of traffic
                if frame.kind == "error":
                    raise StageLostError(decode_error(frame.body))

        step_s = undisturbed_s(timed_pieces(once, pause_s=PAUSE_S))
        worker.stop()
    return max(0.0, step_s - way_s)


def helper_s(*, dtype: ComputeDtype, device: str, way_s: float) -> float:
    """Seconds of a layer whose experts a helper computes, beside the way of the rows."""
    config = small_config(_LAYERS)
    experts = {layer: tuple(range(config.num_experts)) for layer in range(_LAYERS)}
    helper = Helper.load(
        config=config, source=Noise(config), experts=experts, dtype=dtype, device=device
    )
    with _link() as (ours, theirs):
        worker = HelperWorker(helper, link=theirs, name="the helper")
        worker.start()
        asked = _Paced(HelperLink(ours, name="the helper"))
        none_here = dict.fromkeys(experts, ())
        stage = small_stage(_LAYERS, dtype=dtype, device=device, held_experts=none_here)
        stage.join_helpers([(asked, experts)])
        positions = count()

        def once() -> None:
            asked.paused_s = 0.0
            stage.step(small_step(next(positions)), None)

        pieces = timed_pieces(once, pause_s=PAUSE_S, less_s=lambda: asked.paused_s)
        step_s = undisturbed_s(pieces)
        worker.stop()
    return max(0.0, step_s / _LAYERS - way_s)


class _Paced:
    """A helper that is asked after as long as the attention of a layer takes."""

    def __init__(self, helper: HelperLink) -> None:
        self._helper = helper
        self.paused_s = 0.0

    def send(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> None:
        """See `RemoteExperts.send`."""
        began = time.perf_counter()
        while (paused_s := time.perf_counter() - began) < PAUSE_S:  # as busy as with attention
            pass
        self.paused_s += paused_s
        self._helper.send(layer_id, x_RC, rows_A, experts_A)

    def receive(self) -> torch.Tensor:
        """See `RemoteExperts.receive`."""
        return self._helper.receive()


@contextmanager
def _link() -> Iterator[tuple[TcpLink, TcpLink]]:
    """Both ends of a link over loopback, closed at the end."""
    listener = LinkListener(host="127.0.0.1", secret=_SECRET, deployment="gauge", epoch=0)
    accepted: list[TcpLink] = []
    accepting = threading.Thread(
        target=lambda: accepted.append(listener.accept(_TIMEOUT_S)), name="gauge-accept"
    )
    accepting.start()
    ours = dial(listener.address, secret=_SECRET, deployment="gauge", epoch=0, timeout_s=_TIMEOUT_S)
    accepting.join()
    listener.close()
    try:
        yield ours, accepted[0]
    finally:
        ours.close()
        accepted[0].close()
