"""How far a deployment is: phase, conditions, failure; plain data that crosses processes."""

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, get_args

from ... import errors
from ...errors import MagnetarError
from ...fetcher.progress import Phase, Progress
from ..plan import Plan
from .health import PipelineHealth

ConditionType = Literal[
    "SourceVerified",
    "PipelinePlaced",
    "WeightsReady",
    "StagesReady",
    "EndpointReady",
    "DiskHasRoom",
    "AllPipelinesUp",
    "Ready",
]
PARTS: tuple[ConditionType, ...] = (
    "SourceVerified",
    "PipelinePlaced",
    "WeightsReady",
    "StagesReady",
    "EndpointReady",
)
"""`Ready` is the AND of these.

Of the others, `DiskHasRoom` is there, and false, only while the download of a node waits for room;
`AllPipelinesUp` from when a pipeline is lost, and true again when all are back."""
_ORDER: Final = get_args(ConditionType)


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One statement about a deployment, whether it holds, and why."""

    type: ConditionType
    status: bool
    reason: str
    """One word in CamelCase, for programs."""
    message: str = ""
    last_transition_time: str
    """ISO 8601, of the last change of `status`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error that crosses a process border by its class name and message."""

    error: str
    message: str
    details: str = ""
    """The remote traceback, for `--debug`."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """See `MagnetarError.fields`."""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe `error`; what is no `MagnetarError` keeps its type in the message."""
        details = "".join(traceback.format_exception(error))
        if isinstance(error, MagnetarError):
            return cls(
                error=type(error).__name__,
                message=str(error),
                details=details,
                fields=error.fields(),
            )
        message = f"{type(error).__name__}: {error}"
        return cls(error="MagnetarError", message=message, details=details)

    def to_error(self) -> MagnetarError:
        """The same error in this process, with the remote traceback as a note."""
        kind = getattr(errors, self.error, MagnetarError)
        if not (isinstance(kind, type) and issubclass(kind, MagnetarError)):
            kind = MagnetarError
        error = kind(self.message, **self.fields)
        if self.details:
            error.add_note(self.details)
        return error


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedShare:
    """What one node brought of the release."""

    host: str
    wanted_bytes: int
    """Its share, in whole pieces; some of it may have been there before."""
    received_bytes: int
    """Payload that came over the network, from whomever."""
    sent_bytes: int = 0
    """Payload that went to other nodes (and to strangers who asked)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLoad:
    """How far a stage is with reading its weights."""

    pipeline: int = 0
    index: int
    """Within its pipeline."""
    num_layers: int
    """Ready to compute."""
    total_layers: int
    num_bytes: int
    """In memory, of the parts outside the layers too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentStatus:
    """Everything a controller tells about its deployment."""

    name: str
    model_name: str
    epoch: int
    """Grows with every start under the same name."""
    phase: Phase = "metadata"
    """The first that is not over; later ones may have begun."""
    conditions: tuple[Condition, ...] = ()
    plan: Plan | None = None
    chat_format: str | None = None
    url: str | None = None
    """Set once the API answers."""
    fetched: tuple[FetchedShare, ...] = ()
    """By node of the plan, once everything is there; empty for a plain folder."""
    loaded: tuple[StageLoad, ...] = ()
    """By stage, one pipeline after the other, from when they have begun."""
    pipelines: tuple[PipelineHealth, ...] = ()
    """Of each pipeline, from when the deployment serves."""
    failure: Failure | None = None
    finished: bool = False
    """Everything that the deployment had started has ended."""

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return any(c.status for c in self.conditions if c.type == "Ready")

    def to_json(self) -> dict[str, Any]:
        """Field names as keys, JSON types only."""
        return asdict(self) | {"ready": self.ready}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One answer of a controller: what is new since the cursor that was asked with."""

    status: DeploymentStatus
    progress: tuple[Progress, ...] = field(default=())
    cursor: int = 0


def with_condition(
    conditions: tuple[Condition, ...],
    changed: ConditionType,
    *,
    status: bool,
    reason: str,
    message: str = "",
    now: str,
) -> tuple[Condition, ...]:
    """Set one condition and recompute `Ready`; times move only when a status changes."""
    by_type = {condition.type: condition for condition in conditions}

    def put(new: Condition) -> None:
        old = by_type.get(new.type)
        if old is not None and old.status == new.status:
            new = replace(new, last_transition_time=old.last_transition_time)
        by_type[new.type] = new

    put(
        Condition(
            type=changed, status=status, reason=reason, message=message, last_transition_time=now
        )
    )
    missing = [kind for kind in PARTS if kind not in by_type or not by_type[kind].status]
    blocking = by_type.get(missing[0]) if missing else None
    put(
        Condition(
            type="Ready",
            status=not missing,
            reason=(blocking.reason if blocking else "Pending") if missing else "Serving",
            message=blocking.message if blocking else "",
            last_transition_time=now,
        )
    )
    return tuple(by_type[kind] for kind in _ORDER if kind in by_type)


def without_condition(
    conditions: tuple[Condition, ...], gone: ConditionType
) -> tuple[Condition, ...]:
    """Take one away that is none of `PARTS`."""
    return tuple(condition for condition in conditions if condition.type != gone)
