"""What a long-running part tells about itself while it works."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal[
    "build", "metadata", "plan", "download", "verify", "load", "warm", "serving", "seed"
]
PHASES: tuple[Phase, ...] = ("metadata", "plan", "download", "verify", "load", "warm", "serving")
"""Those of a deployment, in order; `build` comes before them, where the demo makes its model, and
`seed` is by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One reading. Amounts are bytes, except in `warm` and `serving`, where they are unused."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    message: str = ""
    """A short clause for people: a file, a layer, a cause of waiting."""
    node: str = ""
    """Host label of the machine that reports; empty for the whole deployment."""
    finished: bool = False
    """The phase is over."""
    lan_bytes_per_s: float = 0.0
    """Of the rate, what comes from other nodes of the cluster."""
    parts: tuple[float, ...] = ()
    """How much of each of `NUM_PARTS` equal parts is there, 0 to 1; what is brought first is first.
    Of a download alone."""
    num_layers: int = 0
    """Ready to compute, while loading."""
    total_layers: int = 0
    is_paused: bool = False
    """It waits for room on the disk and goes on by itself."""

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate, if there is one."""
        if self.rate_bytes_per_s <= 0 or self.total_bytes <= self.done_bytes:
            return None
        return (self.total_bytes - self.done_bytes) / self.rate_bytes_per_s


NUM_PARTS = 24

ProgressSink = Callable[[Progress], None]
"""Called from the working thread; must return at once."""
