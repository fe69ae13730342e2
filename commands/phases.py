"""The state of a phase, summed over the nodes that report it, and amounts as people read them."""

from dataclasses import dataclass, field

from ..fetcher.progress import Progress


def format_bytes(num_bytes: float) -> str:
    """``93.4 GB``: powers of 1000, three digits."""
    amount, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while amount >= 999.5 and len(units) > 1:
        amount /= 1000
        units.pop(0)
    digits = 0 if units[0] == "B" or amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{amount:.{digits}f} {units[0]}"


def format_duration(seconds: float) -> str:
    """``0.8 s``, ``12 s``, ``4:05``, ``1:04:05``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(slots=True)
class PhaseState:
    """One phase of the whole deployment, summed over the nodes that report on their own."""

    phase: str
    began: float
    ended: float | None = None
    readings: dict[str, Progress] = field(default_factory=dict)
    """The latest reading by node; the empty name is the deployment's own."""
    message: str = ""

    def observe(self, progress: Progress, now: float) -> None:
        """Takes in a reading of this phase."""
        self.readings[progress.node] = progress
        nodes = [node for node in self.readings if node]
        prefix = f"{progress.node}: " if len(nodes) > 1 and progress.message else ""
        self.message = prefix + progress.message
        own = self.readings.get("")
        over = own.finished if own else all(each.finished for each in self.readings.values())
        self.ended = (self.ended or now) if over else None
        if over and len(nodes) > 1:
            self.message = f"{len(nodes)} nodes"

    def total(self) -> Progress:
        """All nodes together; the deployment's own reading counts only where no node reports."""
        nodes = [reading for node, reading in self.readings.items() if node]
        parts = nodes or list(self.readings.values())
        return Progress(
            phase=parts[0].phase,
            done_bytes=sum(part.done_bytes for part in parts),
            total_bytes=sum(part.total_bytes for part in parts),
            rate_bytes_per_s=sum(part.rate_bytes_per_s for part in parts if not part.finished),
            message=self.message,
            finished=self.ended is not None,
        )

    def elapsed_s(self, now: float) -> float:
        """How long the phase has taken or took."""
        return (self.ended or now) - self.began

    def amount(self) -> str:
        """``40.1 GB of 93.4 GB``, or nothing where bytes mean nothing."""
        total = self.total()
        if self.phase in ("warm", "serving") or not total.total_bytes:
            return ""
        if self.ended is not None:
            return format_bytes(total.total_bytes)
        return f"{format_bytes(total.done_bytes)} of {format_bytes(total.total_bytes)}"
