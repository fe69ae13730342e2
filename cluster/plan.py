"""The data of planning: what machines there are, what is asked of them, and the answer."""

from dataclasses import dataclass
from typing import Literal

ComputeDtype = Literal["bf16", "fp16", "fp32"]
DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Something that computes and the memory it can use."""

    kind: DeviceKind
    index: int = 0
    memory_bytes: int
    """Free for us: of a CPU the available memory of the machine or its control group."""
    name: str = ""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """All nodes of a cluster."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What the deployment must be able to do."""

    max_context_tokens: int
    max_concurrency: int = 8
    """Sequences of full context whose keys and values must fit."""
    dtype: ComputeDtype | None = None
    """None: what the checkpoint holds."""
    num_stages: int | None = None
    """None: as few as fit."""
    min_context_tokens: int | None = None
    """Where memory is short the context may shrink down to this, with a note; None: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """Consecutive layers on one device."""

    index: int
    host: str
    device: str
    """``cpu`` or ``cuda:0``."""
    first_layer: int
    end_layer: int
    """One past the last layer (global ids)."""
    has_embeddings: bool
    has_output: bool
    dtype: ComputeDtype
    num_threads: int
    weights_bytes: int
    kv_bytes: int
    free_bytes: int
    """Memory of the device left after weights, keys and values, and workspace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusedNode:
    """A node without a stage, and why."""

    host: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A placement of the whole model."""

    stages: tuple[StagePlan, ...]
    num_kv_blocks: int
    """KV blocks of every stage; block ids are global."""
    max_context_tokens: int
    max_concurrency: int
    unused: tuple[UnusedNode, ...] = ()
    notes: tuple[str, ...] = ()
    """What was conceded, for people."""
