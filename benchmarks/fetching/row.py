"""What a case of the benchmarks of fetching found, beside what it is to be."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case; of `ratio` less is better, unless `goal` is a floor."""

    case: str
    ours: float
    reference: float
    goal: float
    is_floor: bool = False

    @property
    def ratio(self) -> float:
        """What the goal is about."""
        return self.ours / self.reference

    @property
    def holds(self) -> bool:
        """Whether the goal is met."""
        return self.ratio >= self.goal if self.is_floor else self.ratio <= self.goal

    def to_json(self) -> dict[str, Any]:
        """One line of a result."""
        return {
            "case": self.case,
            "ours": round(self.ours, 4),
            "reference": round(self.reference, 4),
            "ratio": round(self.ratio, 4),
            "goal": round(self.goal, 4),
            "holds": self.holds,
        }
