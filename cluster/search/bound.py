"""How good a plan can be at all: a bound from a relaxation, by `scipy.optimize.milp` (HiGHS).

First without whole numbers, which takes a moment; then with them, for as many nodes of the search
tree as are worth it. Both limits are counts, not seconds, so that the bound is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from .problem import Problem
from .relaxation import Programme, programme

MOST_TREE_NODES = 60
"""Of HiGHS' branch and bound, for each number of sequences per step."""
_SLACK = 1e-6
"""HiGHS' own tolerance, taken off every bound."""


def least_round_trip_s(problem: Problem, found_s: float, *, num_stages: int | None = None) -> float:
    """No plan has a shorter round trip; `found_s` is that of one, and the most that comes back."""
    built = programme(problem, score=found_s, throughput=False, num_stages=num_stages)
    divided = _solved(built, whole=False)
    return found_s * min(1.0, max(divided, _solved(built, whole=True)))


def most_tokens_per_s(
    problems: Sequence[Problem], found: float, *, num_stages: int | None = None
) -> float:
    """No plan has more tokens per second at any of these numbers of sequences per step; `found` is
    what one has, and the least that comes back."""
    built = [
        programme(problem, score=found, throughput=True, num_stages=num_stages)
        for problem in problems
    ]
    divided = [_solved(each, whole=False) for each in built]
    least = 1.0
    for share, each in sorted(zip(divided, built, strict=True), key=lambda pair: pair[0]):
        # A better bound than the worst of the others is of no use.
        if share < least:
            least = min(least, max(share, _solved(each, whole=True)))
    return found / max(least, _SLACK)


def _solved(built: Programme, *, whole: bool) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    result = milp(
        built.cost,
        integrality=built.is_whole if whole else None,
        bounds=Bounds(0.0, built.most),
        constraints=LinearConstraint(csr_array(built.rows), built.lower, built.upper),
        # With presolve HiGHS prints to stdout where it mends a solution.
        options={"node_limit": MOST_TREE_NODES, "presolve": False},
    )
    if result.status == 2:  # infeasible: nothing is better than what was found
        return 1.0
    bound = result.mip_dual_bound if whole else result.fun
    return 0.0 if bound is None else max(0.0, float(bound) - _SLACK)
