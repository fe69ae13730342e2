"""What the actors of a pipeline are told at their start, and what they must be able to do.

The classes themselves belong to a higher room and are handed in, so that this one needs no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..machines import ComputeDtype
from ..plan import ExpertHost, StagePlan
from .status import StageLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkSetup:
    """Common to all ends of the links of one incarnation of a pipeline."""

    ring: str
    """Who belongs together: the deployment, and which pipeline where it has several."""
    epoch: int
    secret: bytes
    """Key of the handshake; known to the actors alone."""
    listen_host: str
    """Address of this actor's node on which its upstream neighbour reaches it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageAssignment:
    """One stage: what it holds and where it finds it."""

    links: LinkSetup
    stage: StagePlan
    num_kv_blocks: int
    folder: str
    """The release on this node."""
    agent: str
    """The actor that brings it there, and knows which bytes have arrived."""
    facts_json: str
    batch_invariant: bool = False
    """See `DeploymentSpec.batch_invariant`."""
    pipeline: int | None = None
    """Which of several it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HelperAssignment:
    """Experts of one stage on another device: what it holds and where it finds it."""

    links: LinkSetup
    helper: ExpertHost
    stage_index: int
    first_layer: int
    """Of the stage: the first row of the helper's experts."""
    dtype: ComputeDtype
    folder: str
    agent: str
    """As in `StageAssignment`, both."""
    facts_json: str
    batch_invariant: bool = False
    pipeline: int | None = None
    """Which of several the stage belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RingAssignment:
    """The engine of one pipeline."""

    links: LinkSetup
    num_stages: int
    """Those that compute at once: `Pipeline.steps_at_once`."""
    max_step_tokens: int | None
    """As in `Pipeline`."""
    num_kv_blocks: int
    max_running: int
    """Requests that hold KV blocks at once."""
    max_waiting: int
    """Requests that wait for theirs; more are refused."""
    speed: float
    """Against that of the other pipelines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayAssignment:
    """The engines and the API."""

    num_pipelines: int
    folder: str
    """The release on its node, whose config and tokenizer are there already."""
    facts_json: str
    max_context_tokens: int
    model_name: str


class StageRole(Protocol):
    """An actor that holds one stage. Calls come in this order; `loaded`, `stop` any time."""

    def __init__(self, assignment: StageAssignment) -> None: ...

    def listen(self) -> str:
        """Open the upstream link; its ``HOST:PORT``."""
        ...

    def load(self) -> int:
        """Read the weights as they arrive; their bytes in memory. Blocks."""
        ...

    def loaded(self) -> StageLoad:
        """How far `load` is."""
        ...

    def connect(self, downstream: str, helpers: Sequence[str]) -> None:
        """Dial the next in the ring and the stage's helpers, and accept the one before.

        `helpers` are the addresses of the plan's, in its order. Blocks until all links stand.
        """
        ...

    def run(self) -> None:
        """Return after `stop`; raise what ended the stage otherwise. Blocks all its life."""
        ...

    def stop(self) -> None:
        """End the work and the links."""
        ...


class HelperRole(Protocol):
    """An actor with some experts of a stage; calls come as for a `StageRole`."""

    def __init__(self, assignment: HelperAssignment) -> None: ...

    def load(self) -> int:
        """As `StageRole.load`."""
        ...

    def loaded_bytes(self) -> int:
        """How far `load` is."""
        ...

    def listen(self) -> str:
        """Open the link of the stage; its ``HOST:PORT``."""
        ...

    def connect(self) -> None:
        """Accept the stage; blocks until the link stands."""
        ...

    def run(self) -> None:
        """As `StageRole.run`."""
        ...

    def stop(self) -> None:
        """End the work and the link."""
        ...


class GatewayRole(Protocol):
    """An actor with the engines and the API. Calls come in this order; `stop` any time."""

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        """Bind the port before anything else is done, so that a taken one is found out early."""
        ...

    def bind(self) -> int:
        """The port; raises PortInUseError or UsageError where it cannot be had."""
        ...

    def run(self) -> None:
        """Stay until `stop`; whoever called hears when the process dies."""
        ...

    def brief(self, assignment: GatewayAssignment) -> None:
        """Read what is needed besides the pipelines; blocks."""
        ...

    def listen(self, pipeline: int, ring: RingAssignment) -> str:
        """Open the link on which the last stage of a pipeline answers; its ``HOST:PORT``.

        This call and the next two come for each pipeline, and again where it is started again.
        What is left of its engine before is ended.
        """
        ...

    def connect(self, pipeline: int, downstream: str) -> None:
        """Dial stage 0, accept the last one, start the engine; blocks."""
        ...

    def warm(self, pipeline: int) -> float:
        """Seconds that one token took through every stage."""
        ...

    def serve(self) -> str:
        """Answer requests from now on; the URL."""
        ...

    def admit(self, pipeline: int) -> None:
        """Let requests go to a pipeline that is warm again."""
        ...

    def expert_tokens(self) -> Mapping[int, Sequence[int]]:
        """By layer, the tokens that each expert was chosen for since the start; any time."""
        ...

    def ending(self, pipeline: int) -> None:
        """Raise what broke the ring of a pipeline; return soon where nothing did."""
        ...

    def stop(self) -> None:
        """Let running requests end for a moment, then end everything."""
        ...


def stage_name(index: int, pipeline: int | None) -> str:
    """What errors call a stage of one pipeline, or of one of several."""
    return f"stage {index}" if pipeline is None else f"stage {index} of pipeline {pipeline}"


def helper_name(helper: ExpertHost, *, of: str) -> str:
    """What errors call a helper of the stage with that name."""
    return f"the helper on {helper.host} of {of}"


@dataclass(frozen=True, slots=True)
class PipelineRoles:
    """The classes that play the roles; importable by name on every node."""

    stage: type[Any]
    helper: type[Any]
    gateway: type[Any]
