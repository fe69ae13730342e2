"""How fast a device runs the kernels and layers of stages: `cluster.inventory.measure.Gauge`.

Weights are read as decoding reads them: one token's vector times matrices that no cache holds. What
a layer takes whatever its size (calls, threads that wait for each other, matrices that end before
reading is at its rate) is what small layers take beside their bytes.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..cluster.footprint import form_bytes
from ..cluster.inventory.measure import Overheads
from ..cluster.plan import ComputeDtype
from .model.threads import prepare_threads
from .small_model import small_layer_bytes, small_stage, small_step

if TYPE_CHECKING:
    import torch

SLICE_S: Final = 0.25
"""How long each figure is measured for."""
READ_BYTES: Final = 256 << 20
"""Weights that take turns; larger than the caches of a processor."""
READ_WIDTH: Final = 4096
GEMM_ROWS: Final = 512
NUM_LAYERS: Final = (2, 8)
"""Of the two small models."""


class ModelGauge:
    """Measures one device after the other, with as many threads as it is told."""

    def __init__(self) -> None:
        prepare_threads()

    def read_gbps(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Gigabytes of weights per second, as they are held at this dtype."""
        import torch

        held = form_bytes(dtype, (READ_WIDTH, READ_WIDTH))
        products = _products(dtype, device, max(1, int(READ_BYTES / held)))
        with _Threads(num_threads), torch.inference_mode():
            token = torch.ones(1, READ_WIDTH, dtype=_compute_dtype(dtype), device=device)

            def once() -> None:
                for product in products:
                    product(token)

            return len(products) * held / min(_seconds(once, device)) / 1e9

    def gemm_gflops(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Billions of operations per second with as many rows as a chunk of a prompt has."""
        import torch

        (product,) = _products(dtype, device, 1)
        with _Threads(num_threads), torch.inference_mode():
            rows = torch.ones(GEMM_ROWS, READ_WIDTH, dtype=_compute_dtype(dtype), device=device)
            flops = 2 * GEMM_ROWS * READ_WIDTH**2
            return flops / min(_seconds(lambda: product(rows), device)) / 1e9

    def overheads(self, dtype: ComputeDtype, device: str, num_threads: int) -> Overheads:
        """What a small layer, its step and asking a helper take beside the bytes of the layer."""
        from ..cluster.inventory.link_probe import loopback_s
        from .hand_overs import helper_s, worker_s

        way_s = loopback_s()
        with _Threads(num_threads):
            few, many = (_step_s(num, dtype, device) for num in NUM_LAYERS)
            layer_s = max(0.0, (many - few) / (NUM_LAYERS[1] - NUM_LAYERS[0]))
            read_s = small_layer_bytes(dtype) / self.read_gbps(dtype, device, num_threads) / 1e9
            stage = small_stage(NUM_LAYERS[0], dtype=dtype, device=device)
            around_s = worker_s(stage, way_s=way_s)
            asking_s = helper_s(dtype=dtype, device=device, way_s=way_s)
        return Overheads(
            layer_s=max(0.0, layer_s - read_s),
            step_s=max(0.0, around_s - NUM_LAYERS[0] * layer_s),
            helper_s=max(0.0, asking_s - layer_s),
        )


class _Threads:
    """torch with another number of threads for a while."""

    def __init__(self, num_threads: int) -> None:
        import torch

        self._set, self._before = torch.set_num_threads, torch.get_num_threads()
        self._num_threads = num_threads

    def __enter__(self) -> None:
        self._set(self._num_threads)

    def __exit__(self, *_: object) -> None:
        self._set(self._before)


def _step_s(num_layers: int, dtype: ComputeDtype, device: str) -> float:
    """One decode step of one stream through a stage of small layers."""
    stage, position = small_stage(num_layers, dtype=dtype, device=device), 0

    def once() -> None:
        nonlocal position
        stage.step(small_step(position), None)
        position += 1

    return min(_seconds(once, device, limit=1024))


def _products(dtype: ComputeDtype, device: str, count: int) -> "list[Callable[..., object]]":
    """Matrices as stages hold them, ready to multiply."""
    import torch

    from .model.linear import LINEAR_KERNELS, WeightFormat, default_linear_kernel

    weights: WeightFormat = dtype if dtype in ("int8", "int4") else "float"
    kernel = default_linear_kernel(
        dtype=_compute_dtype(dtype), device=torch.device(device), weights=weights
    )
    plain = torch.ones(READ_WIDTH, READ_WIDTH, dtype=_compute_dtype(dtype), device=device)
    return [LINEAR_KERNELS[kernel](plain.clone()) for _ in range(count)]


def _compute_dtype(dtype: ComputeDtype) -> "torch.dtype":
    from .model.loader import COMPUTE_DTYPES

    return COMPUTE_DTYPES[dtype]


def _seconds(once: Callable[[], object], device: str, *, limit: int = 1 << 30) -> list[float]:
    """Of the runs that a slice of time allows; the first one, which warms up, does not count.

    Whatever else runs on a machine makes rates lower, never higher: of them the best run counts.
    """
    import torch

    found: list[float] = []
    began = time.perf_counter()
    once()
    while not found or (time.perf_counter() - began < SLICE_S and len(found) + 1 < limit):
        before = time.perf_counter()
        once()
        if device != "cpu":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - before)
    return found
