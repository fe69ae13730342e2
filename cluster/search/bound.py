"""How good a plan can be at all: a bound from a relaxation, by HiGHS, the solver that
`scipy.optimize.milp` calls, too (docs/adr/0024-bounds-come-from-highs-itself.md).

First without whole numbers, which takes a moment; then with them, for as many nodes of the search
tree as are worth it. Both limits are counts, not seconds, so that the bound is the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .problem import Problem
from .relaxation import Programme, programme

MOST_TREE_NODES = 60
"""Of HiGHS' branch and bound, for each number of sequences per step."""
_SLACK = 1e-6
"""HiGHS' own tolerance, taken off every bound."""
_OPTIONS: dict[str, bool | int | str] = {
    "output_flag": False,
    "threads": 1,
    "mip_max_nodes": MOST_TREE_NODES,
    # With presolve HiGHS prints to stdout where it mends a solution.
    "presolve": "off",
}


def least_round_trip_s(problem: Problem, found_s: float, *, num_stages: int | None = None) -> float:
    """No plan has a shorter round trip; `found_s` is that of one, and the most that comes back."""
    built = programme(problem, score=found_s, throughput=False, num_stages=num_stages)
    divided = _solved(built, whole=False)
    return found_s * min(1.0, max(divided, _solved(built, whole=True)))


def most_tokens_per_s(
    problems: Sequence[Problem],
    found: float,
    *,
    num_stages: int | None = None,
    enough: float = 0.0,
) -> float:
    """No plan has more tokens per second at any of these numbers of sequences per step; `found` is
    what one has, and the least that comes back. A bound of up to `enough` need not be tight."""
    built = [
        programme(problem, score=found, throughput=True, num_stages=num_stages)
        for problem in problems
    ]
    divided = [_solved(each, whole=False) for each in built]
    loose = found / max(min(1.0, *divided), _SLACK)
    if loose <= enough:
        return loose
    least = 1.0
    for share, each in sorted(zip(divided, built, strict=True), key=lambda pair: pair[0]):
        # A better bound than the worst of the others is of no use.
        if share < least:
            least = min(least, max(share, _solved(each, whole=True)))
    return found / max(least, _SLACK)


def _solved(built: Programme, *, whole: bool) -> float:
    import highspy

    row_at, column_at = built.rows.nonzero()
    lp = highspy.HighsLp()
    lp.num_row_, lp.num_col_ = built.rows.shape
    lp.col_cost_, lp.row_lower_, lp.row_upper_ = built.cost, built.lower, built.upper
    lp.col_lower_, lp.col_upper_ = np.zeros(len(built.most)), built.most
    if whole:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        lp.integrality_ = [kinds[int(each)] for each in built.is_whole]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.num_row_, lp.a_matrix_.num_col_ = built.rows.shape
    lp.a_matrix_.start_ = np.searchsorted(row_at, np.arange(len(built.rows) + 1))
    lp.a_matrix_.index_ = column_at
    lp.a_matrix_.value_ = built.rows[row_at, column_at]

    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in _OPTIONS.items():
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    solver.run()
    status, info = solver.getModelStatus(), solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:  # nothing is better than what was found
        return 1.0
    if whole:
        bound = info.mip_dual_bound
    else:
        is_solved = status == highspy.HighsModelStatus.kOptimal
        bound = info.objective_function_value if is_solved else 0.0
    return max(0.0, float(bound) - _SLACK) if math.isfinite(bound) else 0.0
