"""How fast a device runs the kernels and layers of stages: `cluster.inventory.measure.Gauge`.

Weights are read as decoding reads them: one token's vector times matrices that no cache holds. What
a layer takes whatever its size (calls, threads that wait for each other, matrices that end before
reading is at its rate) is what small layers take beside their bytes.

Whatever else a machine does must not show. Everything is therefore measured in pieces of about a
millisecond, two after every pause: who has slept is served first, so that most pieces run on all
cores at once even where others want them. Of the pieces the lower quartile counts. Beside four busy
processes on two cores 256 MB at a time were read at 7 GB/s, and such pieces at 26, as without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Final

from ..cluster.footprint import form_bytes
from ..cluster.inventory.link_probe import loopback_s, undisturbed_s
from ..cluster.inventory.measure import Overheads
from ..cluster.plan import ComputeDtype
from .model.threads import end_team, prepare_threads
from .small_model import small_layer_bytes, small_stage, small_step

if TYPE_CHECKING:
    import torch

    from .engine.stage import Stage

SLICE_S: Final = 0.3
"""How long each figure is measured for."""
PAUSE_S: Final = 0.004
"""Before every two pieces."""
FEWEST: Final = 16
"""Pieces that each figure is of, however long they take."""
READ_BYTES: Final = 256 << 20
"""Weights that take turns; larger than the caches of a processor."""
READ_WIDTH: Final = 4096
GEMM_ROWS: Final = 512
GEMM_WIDTH: Final = 2048
NUM_LAYERS: Final = (1, 4)
"""Of the two small models."""


class ModelGauge:
    """Measures one device after the other, with as many threads as it is told."""

    def __init__(self) -> None:
        prepare_threads()

    def read_gbps(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Gigabytes of weights per second, as they are held at this dtype."""
        return WeightReader(dtype, device).gbps(num_threads)

    def gemm_gflops(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Billions of operations per second with as many rows as a chunk of a prompt has."""
        import torch

        (product,) = _products(dtype, device, GEMM_WIDTH, 1)
        with _threads(num_threads), torch.inference_mode():
            rows = torch.ones(GEMM_ROWS, GEMM_WIDTH, dtype=_compute_dtype(dtype), device=device)
            seconds = _seconds([partial(product, rows)], device)
        return 2 * GEMM_ROWS * GEMM_WIDTH**2 / seconds / 1e9

    def overheads(self, dtype: ComputeDtype, device: str, num_threads: int) -> Overheads:
        """What a small layer, its step and asking a helper take beside the bytes of the layer."""
        from .hand_overs import helper_s, worker_s

        way_s, layers = loopback_s(), SmallLayers(dtype, device)
        layer_s = layers.layer_s(num_threads)
        read_s = small_layer_bytes(dtype) / self.read_gbps(dtype, device, num_threads) / 1e9
        end_team()  # the thread of the worker computes, as in a stage
        with _threads(num_threads):
            around_s = worker_s(layers.few, way_s=way_s)
            asking_s = helper_s(dtype=dtype, device=device, way_s=way_s)
        return Overheads(
            layer_s=max(0.0, layer_s - read_s),
            step_s=max(0.0, around_s - NUM_LAYERS[0] * layer_s),
            helper_s=max(0.0, asking_s - layer_s),
        )


class WeightReader:
    """Weights larger than any cache, to be read again and again."""

    def __init__(self, dtype: ComputeDtype, device: str) -> None:
        self._dtype, self._device = dtype, device
        self._held_bytes = form_bytes(dtype, (READ_WIDTH, READ_WIDTH))
        num = max(1, int(READ_BYTES / self._held_bytes))
        self._products = _products(dtype, device, READ_WIDTH, num)

    def gbps(self, num_threads: int) -> float:
        """Gigabytes per second while one token is computed."""
        import torch

        with _threads(num_threads), torch.inference_mode():
            token = torch.ones(1, READ_WIDTH, dtype=_compute_dtype(self._dtype))
            calls = [partial(each, token.to(self._device)) for each in self._products]
            return self._held_bytes / _seconds(calls, self._device) / 1e9


class SmallLayers:
    """Two stages of small layers, one with more of them than the other."""

    def __init__(self, dtype: ComputeDtype, device: str) -> None:
        self._device = device
        self.few, self._many = (small_stage(num, dtype=dtype, device=device) for num in NUM_LAYERS)
        self._steps = [_stepping(stage) for stage in (self.few, self._many)]

    def layer_s(self, num_threads: int) -> float:
        """One layer in a decode step of one stream."""

        few, many = self._steps
        with _threads(num_threads):
            found = _timed([few, few, many], self._device)
        # Layers are called for, not read: only the quickest were on all cores all the time.
        few_s, many_s = min(found[::2]), min(found[1::2])
        return max(0.0, (many_s - few_s) / (NUM_LAYERS[1] - NUM_LAYERS[0]))


def _stepping(stage: Stage) -> Callable[[], object]:
    positions = count()
    return lambda: stage.step(small_step(next(positions)), None)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """torch with another number of threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _products(
    dtype: ComputeDtype, device: str, width: int, num: int
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Matrices as stages hold them, ready to multiply."""
    import torch

    from .model.linear import LINEAR_KERNELS, WeightFormat, default_linear_kernel

    weights: WeightFormat = dtype if dtype in ("int8", "int4") else "float"
    kernel = default_linear_kernel(
        dtype=_compute_dtype(dtype), device=torch.device(device), weights=weights
    )
    plain = torch.ones(width, width, dtype=_compute_dtype(dtype), device=device)
    return [LINEAR_KERNELS[kernel](plain.clone()) for _ in range(num)]


def _compute_dtype(dtype: ComputeDtype) -> torch.dtype:
    from .model.loader import COMPUTE_DTYPES

    return COMPUTE_DTYPES[dtype]


def _seconds(calls: Sequence[Callable[[], object]], device: str) -> float:
    """One of calls that take turns, undisturbed."""
    return undisturbed_s(_timed(calls, device))


def _timed(calls: Sequence[Callable[[], object]], device: str) -> list[float]:
    """Seconds of calls that take turns, two after every pause; one before them, which wakes the
    threads, does not count."""
    import torch

    found: list[float] = []
    turns, began = cycle(calls), time.perf_counter()
    while len(found) < FEWEST or time.perf_counter() - began < SLICE_S:
        time.sleep(PAUSE_S)
        for number in range(3):
            call, before = next(turns), time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize(device)
            if number:
                found.append(time.perf_counter() - before)
    return found
