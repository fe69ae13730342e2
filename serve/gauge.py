"""How fast a device runs the kernels and layers of stages: `cluster.inventory.measure.Gauge`.

Weights are read as decoding reads them: one token's vector times matrices that no cache holds. What
a layer takes whatever its size (calls, threads that wait for each other) is the slope between two
models so small that nothing else is left of them.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..cluster.footprint import form_bytes
from ..cluster.plan import ComputeDtype
from ..fetcher.config import ModelConfig
from ..fetcher.tensors import TensorEntry, TensorIndex
from .model.threads import prepare_threads

if TYPE_CHECKING:
    import torch

SLICE_S: Final = 0.25
"""How long each figure is measured for."""
READ_BYTES: Final = 256 << 20
"""Weights that take turns; larger than the caches of a processor."""
READ_WIDTH: Final = 4096
GEMM_ROWS: Final = 512
NUM_LAYERS: Final = (2, 6)
"""Of the two small models."""


class ModelGauge:
    """Measures one device after the other, with as many threads as it is told."""

    def __init__(self) -> None:
        prepare_threads()

    def read_gbps(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Gigabytes of weights per second, as they are held at this dtype."""
        import torch

        with _Threads(num_threads), torch.inference_mode():
            held = form_bytes(dtype, (READ_WIDTH, READ_WIDTH))
            products = _products(dtype, device, max(1, int(READ_BYTES / held)))
            token = torch.ones(1, READ_WIDTH, dtype=_compute_dtype(dtype), device=device)

            def once() -> None:
                for product in products:
                    product(token)

            return len(products) * held / min(_seconds(once, device)) / 1e9

    def gemm_gflops(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Billions of operations per second with as many rows as a chunk of a prompt has."""
        import torch

        with _Threads(num_threads), torch.inference_mode():
            (product,) = _products(dtype, device, 1)
            rows = torch.ones(GEMM_ROWS, READ_WIDTH, dtype=_compute_dtype(dtype), device=device)
            flops = 2 * GEMM_ROWS * READ_WIDTH**2
            return flops / min(_seconds(lambda: product(rows), device)) / 1e9

    def overhead_s(self, dtype: ComputeDtype, device: str, num_threads: int) -> tuple[float, float]:
        """Seconds of a layer, and of a whole step beside its layers, when nothing is computed."""
        with _Threads(num_threads):
            few, many = (_step_s(num, dtype, device) for num in NUM_LAYERS)
        layer_s = max(0.0, (many - few) / (NUM_LAYERS[1] - NUM_LAYERS[0]))
        return layer_s, max(0.0, few - NUM_LAYERS[0] * layer_s)


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


class _Noise:
    """A `TensorSource` of a small model: random numbers in the shapes that the loader asks for."""

    def __init__(self, config: ModelConfig) -> None:
        dim, hidden, heads = config.dim, config.hidden_dim, config.n_heads * config.head_dim
        keys = config.n_kv_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, dim)}
        for layer in range(config.n_layers):
            at = f"layers.{layer}"
            for part, rows in (("wq", heads), ("wk", keys), ("wv", keys)):
                shapes[f"{at}.attention.{part}"] = (rows, dim)
            shapes[f"{at}.attention.wo"] = (dim, heads)
            shapes |= {f"{at}.{norm}": (dim,) for norm in ("attention_norm", "ffn_norm")}
            shapes[f"{at}.feed_forward.gate"] = (config.num_experts, dim)
            for expert in range(config.num_experts):
                of = f"{at}.feed_forward.experts.{expert}"
                shapes |= {f"{of}.w1": (hidden, dim), f"{of}.w3": (hidden, dim)}
                shapes[f"{of}.w2"] = (dim, hidden)
        shapes |= {"norm": (dim,), "output": (config.vocab_size, dim)}
        self.index = TensorIndex(
            {
                f"{name}.weight": TensorEntry(
                    name=f"{name}.weight",
                    source_name=name,
                    file="noise",
                    offset=number,
                    dtype="bf16",
                    shape=shape,
                )
                for number, (name, shape) in enumerate(shapes.items())
            }
        )

    def read(self, name: str) -> "torch.Tensor":
        """Small numbers, so that nothing overflows."""
        import torch

        shape = self.index[name].shape
        return torch.randn(shape, dtype=torch.bfloat16) * 0.1


def _step_s(num_layers: int, dtype: ComputeDtype, device: str) -> float:
    """One decode step of one stream through a stage that has next to nothing to compute."""
    from .engine.stage import Stage
    from .engine.step import SamplingParams, StepPlan, StepRow

    config = ModelConfig(
        dim=64,
        n_layers=num_layers,
        head_dim=16,
        hidden_dim=64,
        n_heads=4,
        n_kv_heads=2,
        norm_eps=1e-5,
        vocab_size=512,
        rope_theta=1e4,
        max_context_tokens=4096,
        num_experts=8,
        num_experts_per_tok=2,
    )
    stage = Stage.load(
        config=config,
        source=_Noise(config),
        first_layer=0,
        end_layer=num_layers,
        has_embeddings=True,
        has_output=True,
        dtype=dtype,
        device=device,
        num_kv_blocks=4096 // 16,
    )
    greedy = SamplingParams(temperature=0.0)
    position = 0

    def once() -> None:
        nonlocal position
        row = StepRow(
            request_id=0,
            position=position,
            token_ids=(1,),
            new_block_ids=tuple(range(4096 // 16)) if position == 0 else (),
            sampling=greedy,
        )
        stage.step(StepPlan(step_id=position, rows=(row,)), None)
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
