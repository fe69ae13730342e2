"""What machines there are: nodes, their devices, and the links between them."""

from dataclasses import dataclass
from typing import Literal

ComputeDtype = Literal["bf16", "fp16", "fp32", "int8", "int4"]
"""``int8`` and ``int4`` are of the weights only; everything else is then bf16."""
DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Something that computes and the memory it can use."""

    kind: DeviceKind
    index: int = 0
    memory_bytes: int
    """Free for us: of a CPU the available memory of the machine or its control group."""
    name: str = ""
    assumed: str = ""
    """For people: what of its figures nobody measured on it; empty: there is nothing to say."""
    read_gbps: float | None = None
    """Gigabytes (1e9) per second that computing one token reads weights with; None: unknown."""
    dtype_read_gbps: tuple[tuple[ComputeDtype, float], ...] = ()
    """The same where it depends on the dtype; counts before `read_gbps`."""
    gemm_gflops: float | None = None
    """Billions of floating-point operations per second in large products; None: no limit known."""
    dtype_gemm_gflops: tuple[tuple[ComputeDtype, float], ...] = ()
    """The same where it depends on the dtype; counts before `gemm_gflops`."""
    kv_read_gbps: float | None = None
    """Gigabytes per second that decoding reads keys and values with, whose blocks lie anywhere;
    None: those of weights."""
    attention_gflops: float | None = None
    """Billions of operations per second of attention in prompts, with heads of
    `cost.ATTENTION_HEAD_DIM` in bf16; None: those of large products."""
    layer_overhead_s: float = 0.0
    """What a layer takes in every step whatever its size."""
    step_overhead_s: float = 0.0
    """What a stage takes in every step beside its layers."""
    helper_overhead_s: float = 0.0
    """What a layer takes longer once helpers compute some of its experts, beside the way there and
    back: asking, waiting, putting the outputs in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What it takes to send from one node to another, through the transport that serves."""

    source: str
    target: str
    rtt_s: float
    gbps: float
    """Gigabytes (1e9) per second; a 10 Gbit/s network has 1.25."""
    overhead_s: float = 0.1e-3
    """Software of one message, as far as `rtt_s` does not hold it: framing, two wake-ups. A link
    measured through the transport has none beside its round trip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine as its agent measured it."""

    host: str
    """Stable label; survives restarts of Ray."""
    address: str
    """Where other nodes reach it."""
    num_cpus: int
    devices: tuple[Device, ...]
    disk_free_bytes: int = 0
    held_bytes: int = 0
    """Bytes of this release that the node's store holds already."""
    busy_share: float = 0.0
    """Of its processors, that other work took while its speeds were measured."""

    @property
    def was_busy(self) -> bool:
        """Whether that is worth a word: its speeds may be too low."""
        return self.busy_share >= 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """All nodes of a cluster."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()
    """Those that are known; others are assumed (see `cost.assumed_link`)."""
