"""A line of a benchmark that compares a number with a goal."""

from typing import Any


def row(case: str, ours: float, reference: float, goal: str, holds: bool) -> dict[str, Any]:
    """One case as it is printed."""
    ratio = ours / reference if reference else 1.0
    return {
        "case": case,
        "ours": float(f"{ours:.5g}"),
        "reference": float(f"{reference:.5g}"),
        "ratio": float(f"{ratio:.4g}"),
        "goal": goal,
        "holds": bool(holds),
    }
