"""What a deployment is asked to be: the input of the controller, free of file formats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..fetcher.config import ReleaseHints
from ..fetcher.rates import RateLimits
from .machines import ComputeDtype
from .plan import NodeWish, Objective
from .planning.expert_pins import ExpertPin

SourceKind = Literal["magnet", "torrent", "folder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """Where the release comes from."""

    kind: SourceKind
    location: str
    """A repaired magnet link, or the absolute path of a .torrent file or a release folder."""
    peers: tuple[str, ...] = ()
    """``HOST:PORT`` of peers to ask besides those the swarm names."""
    trackers: tuple[str, ...] = ()
    """URLs to ask besides those of the link; like `web_seeds` they may be on the own network."""
    web_seeds: tuple[str, ...] = ()
    timeout_s: float | None = None
    """Give up when nothing arrives for this long; None waits for ever."""
    limits: RateLimits = field(default_factory=RateLimits)
    """Of each node."""
    given: ReleaseHints = field(default_factory=ReleaseHints)
    """Facts the user gave; they win over the release's own files."""
    known: ReleaseHints = field(default_factory=ReleaseHints)
    """Facts the catalogue knows; they fill in what the files lack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentSpec:
    """One model, served."""

    name: str
    source: SourceSpec
    store: str
    """Store folder on every node; ``{host}`` in it becomes the node's host label."""
    model_name: str
    """What clients pass as `model`."""
    dtype: ComputeDtype | None = None
    batch_invariant: bool = False
    """Reproducible mode: what a request gets depends, to the bit, on nothing but itself; slower."""
    num_stages: int | None = None
    """Of each pipeline."""
    num_pipelines: int | None = None
    """As in `Workload`."""
    objective: Objective = "latency"
    """What placement is best at where the speeds of all nodes are known."""
    node_wishes: tuple[NodeWish, ...] = ()
    """What single nodes may be used for."""
    expert_pins: tuple[ExpertPin, ...] = ()
    """Experts for certain nodes, on top of the placement."""
    max_context_tokens: int | None = None
    """None: the model's own, shortened to what memory holds."""
    max_concurrency: int = 8
    """Requests whose keys and values fit at full context."""
    max_running: int | None = None
    """Requests worked on at once, most of them shorter than the context; None: `running_limit`."""
    max_waiting: int = 256
    """Requests that wait to be worked on; more are refused until some are done."""
    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one."""
    api_key_file: str | None = None
    """Needed to listen on anything but loopback."""
    wan_mbps: Mapping[str, float] = field(default_factory=dict)
    """By host, Mbit/s from outside, where that is known; 0: no way out."""
    fetch_full: bool = False
    """Every node of the plan brings the whole release, so that a later plan needs no download."""

    @property
    def running_limit(self) -> int:
        """`max_running`, or else 64, and more where that many fit at full context."""
        return self.max_running or max(64, self.max_concurrency)
