"""How fast this machine is: measured once by the kernels of the serving room, then cached."""

import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from ...settings import data_dir
from ..machines import ComputeDtype, Device, DeviceKind, Node
from .other_work import OtherWork

VERSION: Final = 8
"""Of the method; figures of another one are measured again."""
DTYPES: Final[Mapping[DeviceKind, tuple[ComputeDtype, ...]]] = {
    "cpu": ("bf16", "fp32", "int8", "int4"),
    "cuda": ("bf16", "fp32"),
}
"""What is measured. On CUDA int8 and int4 are not fast yet; they count as bf16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """Seconds that are left when nothing is computed."""

    layer_s: float
    step_s: float
    """Of a step, beside its layers and the way to the stage."""
    helper_s: float
    """Of a layer with a helper, beside the layer itself and the way there and back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpeed:
    """Of attention over keys and values in bf16, in blocks that lie anywhere."""

    kv_read_gbps: float
    """Gigabytes per second while tokens are decoded."""
    gflops: float
    """Billions of operations per second with a chunk of a prompt."""


class Gauge(Protocol):
    """Measures the kernels that stages use. Calls block, each for a second at most."""

    def read_gbps(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Gigabytes of weights per second while one token is computed."""
        ...

    def gemm_gflops(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        """Billions of operations per second with hundreds of tokens."""
        ...

    def attention(self, device: str, num_threads: int) -> AttentionSpeed:
        """Attention by itself, over contexts that no cache holds."""
        ...

    def overheads(
        self, dtype: ComputeDtype, device: str, num_threads: int, *, read_gbps: float
    ) -> Overheads:
        """What a layer, a step and asking a helper take when nothing is computed, on a device that
        was just seen to read weights of this dtype at `read_gbps`."""
        ...


def with_known_speeds(node: Node) -> Node:
    """`node` with what was measured on this machine before; unknown devices stay as they are."""
    cached = _read_cache(_cache_file())
    rows = [cached.get(_key(node, device)) for device in node.devices]
    return replace(
        node,
        devices=tuple(
            _with_row(device, row) for device, row in zip(node.devices, rows, strict=True)
        ),
        busy_share=max((row["busy_share"] for row in rows if row is not None), default=0.0),
    )


def measure_speeds(node: Node, gauge: Gauge, *, again: bool = False) -> Node:
    """`node`, which must be this machine, with the speeds of all its devices; blocks for seconds.

    What was measured before is taken from the cache unless `again`.
    """
    file = _cache_file()
    cached = {} if again else _read_cache(file)
    rows = {}
    for device in node.devices:
        key = _key(node, device)
        rows[key] = cached.get(key) or _measure(device, node.num_cpus, gauge)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_read_cache(file) | rows, indent=1), encoding="utf-8")
    temporary.replace(file)
    return with_known_speeds(node)


def _measure(device: Device, num_threads: int, gauge: Gauge) -> dict[str, Any]:
    where = "cpu" if device.kind == "cpu" else f"cuda:{device.index}"
    dtypes, others = DTYPES[device.kind], OtherWork()

    def gemm() -> list[float]:
        return [gauge.gemm_gflops(dtype, where, num_threads) for dtype in dtypes]

    read = {dtype: gauge.read_gbps(dtype, where, num_threads) for dtype in reversed(dtypes)}
    # Twice, seconds apart: a guest on the same cores halves what they compute for some tenths of
    # one, and nothing here tells of that.
    early = gemm()
    overheads = gauge.overheads("bf16", where, num_threads, read_gbps=read["bf16"])
    attention = gauge.attention(where, num_threads)
    best = [max(pair) for pair in zip(early, gemm(), strict=True)]
    row = {
        "read_gbps": read,
        "gemm_gflops": dict(zip(dtypes, best, strict=True)),
        "kv_read_gbps": attention.kv_read_gbps,
        "attention_gflops": attention.gflops,
        "layer_overhead_s": overheads.layer_s,
        "step_overhead_s": overheads.step_s,
        "helper_overhead_s": overheads.helper_s,
    }
    return row | {"busy_share": others.share()}


def _with_row(device: Device, row: dict[str, Any] | None) -> Device:
    if row is None:
        return device

    def others(rates: dict[ComputeDtype, float]) -> tuple[tuple[ComputeDtype, float], ...]:
        return tuple((dtype, rate) for dtype, rate in rates.items() if dtype != "bf16")

    return replace(
        device,
        read_gbps=row["read_gbps"]["bf16"],
        dtype_read_gbps=others(row["read_gbps"]),
        gemm_gflops=row["gemm_gflops"]["bf16"],
        dtype_gemm_gflops=others(row["gemm_gflops"]),
        kv_read_gbps=row["kv_read_gbps"],
        attention_gflops=row["attention_gflops"],
        layer_overhead_s=row["layer_overhead_s"],
        step_overhead_s=row["step_overhead_s"],
        helper_overhead_s=row["helper_overhead_s"],
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
