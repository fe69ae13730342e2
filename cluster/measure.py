"""How fast this machine is: weights read per second and operations per second, once, then cached.

The weights are read as decoding reads them: one token's vector times matrices that no cache holds.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from ..settings import data_dir
from .plan import ComputeDtype, Device, Node

VERSION: Final = 1
"""Of the method; figures of another one are measured again."""
SLICE_S: Final = 0.6
"""How long each figure is measured for; six slices a device stay far under ten seconds."""
_READ_BYTES: Final = 256 << 20
"""Weights that take turns; larger than the caches of a processor."""
_READ_WIDTH: Final = 4096
_GEMM_SIZE: Final = 1024
_DTYPES: Final[tuple[ComputeDtype, ...]] = ("fp32", "bf16")
_TORCH_NAMES: Final = {"fp32": "float32", "bf16": "bfloat16"}


def with_known_speeds(node: Node) -> Node:
    """`node` with what was measured on this machine before; unknown devices stay as they are."""
    cached = _read_cache(_cache_file())
    return replace(
        node,
        devices=tuple(_with_row(device, cached.get(_key(node, device))) for device in node.devices),
    )


def measure_speeds(node: Node, *, again: bool = False) -> Node:
    """`node`, which must be this machine, with the speeds of all its devices; blocks for seconds.

    What was measured before is taken from the cache unless `again`.
    """
    file = _cache_file()
    cached = {} if again else _read_cache(file)
    rows = {}
    for device in node.devices:
        key = _key(node, device)
        rows[key] = cached.get(key) or _measure(device, node.num_cpus)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_read_cache(file) | rows, indent=1), encoding="utf-8")
    temporary.replace(file)
    return with_known_speeds(node)


def _measure(device: Device, num_threads: int) -> dict[str, Any]:
    import torch

    where = "cpu" if device.kind == "cpu" else f"cuda:{device.index}"
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            return {
                "read_gbps": {dtype: _read_gbps(dtype, where) for dtype in _DTYPES},
                "gemm_gflops": {dtype: _gemm_gflops(dtype, where) for dtype in _DTYPES},
            }
    finally:
        torch.set_num_threads(before)


def _read_gbps(dtype: ComputeDtype, where: str) -> float:
    import torch

    kind = getattr(torch, _TORCH_NAMES[dtype])
    matrix_bytes = _READ_WIDTH * _READ_WIDTH * kind.itemsize
    token = torch.ones(1, _READ_WIDTH, dtype=kind, device=where)
    held: Callable[[Any], Any] = torch.clone
    multiply: Callable[[Any], object] = partial(torch.nn.functional.linear, token)
    if where == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        # As stages do: plain products lay every matrix out anew, and read bf16 at a fifth.
        held = torch.ops.mkldnn._reorder_linear_weight
        product = torch.ops.mkldnn._linear_pointwise.default
        multiply = lambda matrix: product(token, matrix, None, "none", [], "")  # noqa: E731
    plain = torch.ones(_READ_WIDTH, _READ_WIDTH, dtype=kind, device=where)
    matrices = [held(plain) for _ in range(max(1, _READ_BYTES // matrix_bytes))]

    def once() -> None:
        for matrix in matrices:
            multiply(matrix)

    return _best_rate(once, len(matrices) * matrix_bytes, where) / 1e9


def _gemm_gflops(dtype: ComputeDtype, where: str) -> float:
    import torch

    kind = getattr(torch, _TORCH_NAMES[dtype])
    size = _GEMM_SIZE if where == "cpu" else 4 * _GEMM_SIZE
    left, right = (torch.ones(size, size, dtype=kind, device=where) for _ in range(2))
    return _best_rate(lambda: torch.mm(left, right), 2 * size**3, where) / 1e9


def _best_rate(once: Callable[[], object], amount: float, where: str) -> float:
    """Amount per second of the quickest of the runs that a slice of time allows."""
    import torch

    def seconds() -> float:
        began = time.perf_counter()
        once()
        if where != "cpu":
            torch.cuda.synchronize(where)
        return time.perf_counter() - began

    began = time.perf_counter()
    seconds()  # the first one touches memory and chooses kernels
    quickest = seconds()
    while time.perf_counter() - began < SLICE_S:
        quickest = min(quickest, seconds())
    return amount / quickest


def _with_row(device: Device, row: dict[str, Any] | None) -> Device:
    if row is None:
        return device
    reads = {dtype: float(row["read_gbps"][dtype]) for dtype in _DTYPES}
    flops = {dtype: float(row["gemm_gflops"][dtype]) for dtype in _DTYPES}
    return replace(
        device,
        read_gbps=reads["bf16"],
        dtype_read_gbps=(("fp32", reads["fp32"]),),
        gemm_gflops=flops["bf16"],
        dtype_gemm_gflops=(("fp32", flops["fp32"]),),
    )


def _key(node: Node, device: Device) -> str:
    """A device of this machine as it was measured: names, threads, method."""
    return (
        f"v{VERSION} {platform.node()} {device.kind}:{device.index} {device.name} "
        f"{node.num_cpus} threads"
    )


def _cache_file() -> Path:
    return data_dir() / "speeds.json"


def _read_cache(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}
