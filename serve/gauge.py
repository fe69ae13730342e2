"""How fast a device runs the kernels and layers of stages: `cluster.inventory.measure.Gauge`.

Weights are read as decoding reads them: one token's vector times matrices that no cache holds. What
a layer takes whatever its size (calls, threads that wait for each other, matrices that end before
reading is at its rate) is what small layers take beside their bytes.

Whatever else a machine does must not show: everything is measured in pieces of about a millisecond,
of which those count that nothing disturbed (`cluster.inventory.pieces`). No figure takes longer
than a fixed time, however busy the machine is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, cycle
from typing import TYPE_CHECKING, Final

from ..cluster.footprint import form_bytes
from ..cluster.inventory.caches import last_level_cache_bytes
from ..cluster.inventory.link_probe import PAUSE_S, loopback_s
from ..cluster.inventory.measure import AttentionSpeed, Overheads
from ..cluster.inventory.pieces import SLICE_S, Piece, timed_pieces, undisturbed_s
from ..cluster.machines import ComputeDtype
from .model.threads import end_team, prepare_threads
from .small_attention import SmallAttention
from .small_model import small_layer_bytes, small_stage, small_step

if TYPE_CHECKING:
    import torch

    from .engine.stage import Stage

READ_BYTES: Final = 128 << 20
"""Weights that take turns, at least, and more where caches are large."""
MOST_READ_BYTES: Final = 1 << 30
READ_PIECE_BYTES: Final = 8 << 20
"""Of one matrix for each thread: some tenths of a millisecond, far more than calling it takes."""
CUDA_PIECE_BYTES: Final = 256 << 20
READ_INPUTS: Final = 4096
GEMM_ROWS: Final = 256
GEMM_WIDTH: Final = 1024
"""For two threads; its square grows with their number."""
CUDA_GEMM: Final = (2048, 8192)
"""Rows and width."""
NUM_LAYERS: Final = (1, 4)
"""Of the two small models."""
_OUTPUTS: Final = 256
"""Matrices have a multiple of these."""


class ModelGauge:
    """Measures one device after the other, with as many threads as it is told."""

    def __init__(self) -> None:
        prepare_threads()

    def read_gbps(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Gigabytes of weights per second, as they are held at this dtype."""
        return WeightReader(dtype, device, num_threads).gbps(num_threads)

    def gemm_gflops(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Billions of operations per second with as many rows as a chunk of a prompt has."""
        import torch

        num_rows, width = CUDA_GEMM
        if device == "cpu":
            num_rows, width = GEMM_ROWS, GEMM_WIDTH * math.ceil(math.sqrt(num_threads / 2))
        (product,) = _products(dtype, device, (width, width), 1)
        with _threads(num_threads), torch.inference_mode():
            rows = torch.ones(num_rows, width, dtype=_compute_dtype(dtype), device=device)
            seconds = undisturbed_s(_timed([partial(product, rows)], device, slice_s=SLICE_S / 2))
        return 2 * num_rows * width**2 / seconds / 1e9

    def attention(self, device: str, num_threads: int) -> AttentionSpeed:
        """Keys and values while tokens are decoded, and attention of chunks of prompts."""
        import torch

        parts = SmallAttention(device, num_threads)
        with _threads(num_threads), torch.inference_mode():
            # In turns, so that both see the same machine; the first of two calls does not count.
            turns = [chunk for chunk in (parts.first_chunk, parts.deep_chunk) for _ in range(2)]
            found = _timed(turns, device, counted=1)
        deep_s, first_s = undisturbed_s(found[::2]), undisturbed_s(found[1::2])
        return AttentionSpeed(
            kv_read_gbps=kv_read_gbps(parts, device, num_threads),
            gflops=parts.score_flops / max(deep_s - first_s, deep_s / 10) / 1e9,
        )

    def overheads(
        self, dtype: ComputeDtype, device: str, num_threads: int, *, read_gbps: float
    ) -> Overheads:
        """What a small layer, its step and asking a helper take beside the bytes of the layer."""
        from .hand_overs import helper_s, worker_s

        weights = WeightReader(dtype, device, num_threads)
        way_s, layers = loopback_s(), SmallLayers(dtype, device, weights)
        layer_s = layers.layer_s(num_threads)
        read_s = small_layer_bytes(dtype) / read_gbps / 1e9
        end_team()  # the thread of the worker computes, as in a stage
        with _threads(num_threads):
            around_s = worker_s(layers.few, way_s=way_s)
            asking_s = helper_s(dtype=dtype, device=device, way_s=way_s)
        return Overheads(
            layer_s=max(0.0, layer_s - read_s),
            step_s=max(0.0, around_s - NUM_LAYERS[0] * layer_s),
            helper_s=max(0.0, asking_s - layer_s),
        )


def kv_read_gbps(attention: SmallAttention, device: str, num_threads: int) -> float:
    """Gigabytes of keys and values per second while tokens are decoded."""
    import torch

    with _threads(num_threads), torch.inference_mode():
        return attention.read_bytes / _seconds(attention.decoding, device) / 1e9


class WeightReader:
    """Weights larger than any cache, to be read again and again."""

    def __init__(self, dtype: ComputeDtype, device: str, num_threads: int) -> None:
        self._dtype, self._device = dtype, device
        piece_bytes = CUDA_PIECE_BYTES
        if device == "cpu":
            piece_bytes = min(CUDA_PIECE_BYTES, READ_PIECE_BYTES * num_threads)
        at_once = (_OUTPUTS, READ_INPUTS)
        shape = (_OUTPUTS * max(1, piece_bytes // form_bytes(dtype, at_once)), READ_INPUTS)
        self._held_bytes = form_bytes(dtype, shape)
        whole_bytes = min(max(READ_BYTES, 2 * last_level_cache_bytes()), MOST_READ_BYTES)
        num = max(2, math.ceil(whole_bytes / self._held_bytes))
        self._products = _products(dtype, device, shape, num)
        self._num_past_caches = max(1, min(num, 2 * last_level_cache_bytes() // self._held_bytes))

    def gbps(self, num_threads: int) -> float:
        """Gigabytes per second while one token is computed."""
        import torch

        with _threads(num_threads), torch.inference_mode():
            token = torch.ones(1, READ_INPUTS, dtype=_compute_dtype(self._dtype))
            calls = [partial(each, token.to(self._device)) for each in self._products]
            return self._held_bytes / _seconds(calls, self._device) / 1e9

    def fill_caches(self) -> None:
        """Read as much as caches hold, twice, so that nothing of what was there before is."""
        import torch

        with torch.inference_mode():
            token = torch.ones(1, READ_INPUTS, dtype=_compute_dtype(self._dtype))
            token = token.to(self._device)
            for product in self._products[: self._num_past_caches]:
                product(token)


class SmallLayers:
    """Two stages of small layers, one with more of them than the other.

    Other weights are read before each step, as a step of many layers reads them: caches held a part
    of so few layers from one step to the next, and a layer then took less than its bytes do.
    """

    def __init__(self, dtype: ComputeDtype, device: str, weights: WeightReader) -> None:
        self._device, self._weights = device, weights
        self.few, self._many = (small_stage(num, dtype=dtype, device=device) for num in NUM_LAYERS)
        self._steps = [_stepping(stage) for stage in (self.few, self._many)]

    def layer_s(self, num_threads: int) -> float:
        """One layer in a decode step of one stream."""

        few, many = self._steps
        fill = self._weights.fill_caches
        with _threads(num_threads):
            # The first round, which does not count, is of many layers.
            found = _timed([fill, many, fill, few], self._device, counted=1)
        few_s, many_s = undisturbed_s(found[::2]), undisturbed_s(found[1::2])
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
    dtype: ComputeDtype, device: str, shape: tuple[int, int], num: int
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Matrices [N, K] as stages hold them, ready to multiply."""
    import torch

    from .model.linear import LINEAR_KERNELS, WeightFormat, default_linear_kernel

    weights: WeightFormat = dtype if dtype in ("int8", "int4") else "float"
    kernel = default_linear_kernel(
        dtype=_compute_dtype(dtype), device=torch.device(device), weights=weights
    )
    plain = torch.ones(*shape, dtype=_compute_dtype(dtype), device=device)
    # The plain kernel alone multiplies with the weight itself; the others lay out a copy.
    weights_of = [plain.clone() if kernel == "plain" else plain for _ in range(num)]
    return [LINEAR_KERNELS[kernel](each) for each in weights_of]


def _compute_dtype(dtype: ComputeDtype) -> torch.dtype:
    from .model.loader import COMPUTE_DTYPES

    return COMPUTE_DTYPES[dtype]


def _seconds(calls: Sequence[Callable[[], object]], device: str) -> float:
    """One of calls that take turns, undisturbed."""
    return undisturbed_s(_timed(calls, device))


def _timed(
    calls: Sequence[Callable[[], object]],
    device: str,
    *,
    counted: int = 2,
    slice_s: float = SLICE_S,
) -> list[Piece]:
    """Calls that take turns, after every pause one that does not count and some that do."""
    import torch

    turns = cycle(calls)

    def work() -> None:
        next(turns)()
        if device != "cpu":
            torch.cuda.synchronize(device)

    return timed_pieces(
        work,
        pause_s=PAUSE_S,
        warm=1,
        counted=counted,
        num_threads=torch.get_num_threads(),
        slice_s=slice_s,
    )
