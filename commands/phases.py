"""The state of a phase, summed over the nodes that report it, and amounts as people read them."""

from collections.abc import Sequence
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


def headed(text: str, kind: str) -> str:
    """A ``note``, ``warning`` or ``error`` as people are told it."""
    return f"magnetar: {kind}: {text}" if kind != "error" else f"magnetar: {text}"


def format_rate(progress: Progress, *, sides: bool = True) -> str:
    """``92 MB/s``, or by `sides`, where there are two, ``12 MB/s WAN, 80 MB/s LAN``."""
    lan = progress.lan_bytes_per_s
    if not (sides and lan):
        return f"{format_bytes(progress.rate_bytes_per_s)}/s"
    wan = max(0.0, progress.rate_bytes_per_s - lan)
    return f"{format_bytes(wan)}/s WAN, {format_bytes(lan)}/s LAN"


def format_eta(eta_s: float | None) -> str:
    """``4:05 left``, or nothing where that cannot be said."""
    return "" if eta_s is None else f"{format_duration(eta_s)} left"


def format_amount(progress: Progress) -> str:
    """``40.1 GB of 93.4 GB``, or nothing where bytes mean nothing."""
    if progress.phase in ("warm", "serving") or not progress.total_bytes:
        return ""
    if progress.finished:
        return format_bytes(progress.total_bytes)
    return f"{format_bytes(progress.done_bytes)} of {format_bytes(progress.total_bytes)}"


def pieces_bar(parts: Sequence[float], *, plain: bool) -> str:
    """One character for each part: empty, begun, half there, nearly and whole."""
    shades = " .:+#" if plain else " ░▒▓█"
    return "".join(shades[_shade(part)] for part in parts)


def _shade(part: float) -> int:
    return 4 if part >= 1 else 0 if part <= 0 else 1 + min(2, int(part * 3))


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
        is_one_of_several = progress.node and len(nodes) > 1
        prefix = f"{progress.node}: " if is_one_of_several and progress.message else ""
        self.message = prefix + progress.message
        own = self.readings.get("")
        over = own.finished if own else all(each.finished for each in self.readings.values())
        self.ended = (self.ended or now) if over else None
        if over and len(nodes) > 1:
            self.message = f"{len(nodes)} nodes"

    def nodes(self) -> list[Progress]:
        """What each of several nodes says, by name; empty where only one does."""
        found = [self.readings[node] for node in sorted(self.readings) if node]
        return found if len(found) > 1 else []

    def total(self) -> Progress:
        """All nodes together; the deployment's own reading counts only where no node reports."""
        nodes = [reading for node, reading in self.readings.items() if node]
        each = nodes or list(self.readings.values())
        moving = [reading for reading in each if not reading.finished]
        return Progress(
            phase=each[0].phase,
            done_bytes=sum(reading.done_bytes for reading in each),
            total_bytes=sum(reading.total_bytes for reading in each),
            rate_bytes_per_s=sum(reading.rate_bytes_per_s for reading in moving),
            lan_bytes_per_s=sum(reading.lan_bytes_per_s for reading in moving),
            message=self.message,
            finished=self.ended is not None,
            parts=each[0].parts if len(each) == 1 else (),
            num_layers=sum(reading.num_layers for reading in each),
            total_layers=sum(reading.total_layers for reading in each),
            is_paused=any(reading.is_paused for reading in moving),
        )

    def eta_s(self) -> float | None:
        """Until the last node is done; of all together where nobody says."""
        told = [node.eta_s for node in self.nodes() if not node.finished]
        known = [eta_s for eta_s in told if eta_s is not None]
        return max(known, default=self.total().eta_s)

    def elapsed_s(self, now: float) -> float:
        """How long the phase has taken or took."""
        return (self.ended or now) - self.began

    def amount(self) -> str:
        """That of all nodes together."""
        return format_amount(self.total())
