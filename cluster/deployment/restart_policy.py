"""When a pipeline that was lost is started again. Pure: what happened and when, in; when next, out.

The first start comes at once, for most faults happen once. Each that fails, or does not last, makes
the next one come later, so that what cannot work costs little; and none is ever the last, because
what is missing may come back (why these numbers: ADR 23).
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

SECOND_DELAY_S: Final = 1.0
"""After the second failure in a row; each further one doubles it."""
MAX_DELAY_S: Final = 60.0
STEADY_S: Final = 600.0
"""A pipeline that served for so long begins a new row of failures when it is lost."""
LOOP_FAILURES: Final = 3
"""From so many in a row on, it is said to be in a crash loop."""

PipelineState = Literal["up", "waiting", "starting"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarts:
    """Where one pipeline stands, and what went before.

    ``up --lost--> waiting --begun--> starting --done--> up``, and ``starting --lost--> waiting``.
    Times are readings of one monotonic clock.
    """

    state: PipelineState = "up"
    since_s: float
    """When the state began."""
    num_failures: int = 0
    """In a row: losses, and starts that failed."""
    num_restarts: int = 0
    """Starts that succeeded, the first one aside."""

    @property
    def is_looping(self) -> bool:
        """It does not stay up, or does not come up."""
        return self.num_failures >= LOOP_FAILURES

    @property
    def due_s(self) -> float:
        """When the next start is due; while `waiting`."""
        return self.since_s + delay_s(self.num_failures)

    def lost(self, now_s: float) -> "Restarts":
        """It broke, or its start failed."""
        assert self.state != "waiting", "what is down cannot be lost"
        was_steady = self.state == "up" and now_s - self.since_s >= STEADY_S
        num_failures = 1 if was_steady else self.num_failures + 1
        return replace(self, state="waiting", since_s=now_s, num_failures=num_failures)

    def begun(self, now_s: float) -> "Restarts":
        """It is being started."""
        assert self.state == "waiting", "only what is down is started"
        return replace(self, state="starting", since_s=now_s)

    def done(self, now_s: float) -> "Restarts":
        """It serves again."""
        assert self.state == "starting", "it serves because it was started"
        return replace(self, state="up", since_s=now_s, num_restarts=self.num_restarts + 1)


def delay_s(num_failures: int) -> float:
    """How long to wait after so many failures in a row."""
    if num_failures <= 1:
        return 0.0
    # The exponent is bounded, or a float would not hold the power.
    return min(SECOND_DELAY_S * 2.0 ** min(num_failures - 2, 32), MAX_DELAY_S)
