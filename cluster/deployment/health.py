"""How the pipelines of a deployment are while it serves, and what that means for its conditions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from .restart_policy import PipelineState

NODE_PATIENCE_S: Final = 60.0
"""A node that is away for longer is said not to come back by itself."""

Reason = Literal["Serving", "Restarted", "PipelineLost", "CrashLoop", "NodeLost", "NodeGone"]
_GRAVITY: Final[tuple[Reason, ...]] = get_args(Reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineHealth:
    """One pipeline, from when the deployment serves."""

    number: int
    state: PipelineState = "up"
    since: str
    """ISO 8601: when it came up, or was lost."""
    num_restarts: int = 0
    """How often it was started again and came up."""
    num_failures: int = 0
    """Losses, and starts that failed, in a row."""
    is_looping: bool = False
    """See `Restarts`."""
    cause: str = ""
    """What ended it last."""
    obstacle: str = ""
    """What kept it from coming up when that was tried last; nothing once it is up."""
    missing: tuple[str, ...] = ()
    """Nodes it waits for."""
    is_patient: bool = True
    """They have not been away for `NODE_PATIENCE_S` yet."""

    @property
    def reason(self) -> Reason:
        """In one word for programs, the gravest first."""
        if self.state == "up":
            return "Restarted" if self.num_restarts else "Serving"
        if self.missing:
            return "NodeLost" if self.is_patient else "NodeGone"
        return "CrashLoop" if self.is_looping else "PipelineLost"

    @property
    def message(self) -> str:
        """What happened, and what is done about it or has to be. Changes as `reason` does."""
        nodes = ", ".join(self.missing)
        failed = f"; it did not come up: {self.obstacle}" if self.obstacle else ""
        match self.reason:
            case "Serving":
                return ""
            case "Restarted":
                return (
                    f"back after: {self.cause} (started again {_times(self.num_restarts)} so far)"
                )
            case "NodeLost":
                return f"{self.cause}; it is started again when {nodes} is back"
            case "NodeGone":
                return (
                    f"{self.cause}; {nodes} did not come back within {NODE_PATIENCE_S:.0f} s: join "
                    "it to Ray again under its name, or take the deployment down and bring it up "
                    "without it"
                )
            case "CrashLoop":
                return f"again and again: {self.cause}{failed}; it is tried ever more seldom"
            case "PipelineLost":
                return f"{self.cause}{failed}; it is being started again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What all pipelines together mean."""

    all_up: bool
    any_up: bool
    reason: Reason
    message: str


def verdict(healths: Sequence[PipelineHealth]) -> Verdict:
    """Of all pipelines of a deployment; the reason is the gravest of those of its pipelines."""
    lost = [each for each in healths if each.state != "up"]
    told = lost or [each for each in healths if each.num_restarts]
    reasons: list[Reason] = [each.reason for each in told]
    grave: Reason = max(reasons, key=_GRAVITY.index) if reasons else "Serving"
    message = "; ".join(
        f"pipeline {each.number}: {each.message}" if len(healths) > 1 else each.message
        for each in told
    )
    if lost and len(healths) > 1:
        rest = ", requests go to the others" if len(lost) < len(healths) else ""
        message = f"{len(lost)} of {len(healths)} pipelines lost{rest}: {message}"
    return Verdict(all_up=not lost, any_up=len(lost) < len(healths), reason=grave, message=message)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
