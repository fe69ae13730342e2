"""The least round trip along one order of stages, but for the way back.

With all of them one stage follows the other; where any may be left out, a stage goes on from the
best of all before it, for every number of layers.

    P  partial routes, by their last stage      K, V  as in `stage_times.py`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .problem import Matrix, Route
from .stage_times import Growth, Stage, Within, start_of

_SAFE = 1 - 1e-9
"""Of a sum that is compared with one of another order."""


def least_with_all(within: Within) -> Route | None:
    """The best cut with all these stages in their order."""
    order, hops, band_SKV = within.stages, within.hops, within.band_SKV
    cost_V = _nothing(within.times.problem.num_layers)
    grow = Growth(band_SKV)
    before = []
    for number, stage in enumerate(order):
        if number:
            cost_V = cost_V + hops[order[number - 1].home, stage.home]
        before.append(cost_V)
        cost_V = grow(cost_V[None], band_SKV[number : number + 1])[0]
    if cost_V[-1] == np.inf:
        return None
    ends = [len(cost_V) - 1]
    for number in range(len(order) - 1, 0, -1):
        ends.insert(0, start_of(before[number], band_SKV[number], ends[0]))
    return within.times.route(order, ends)


def least_with_some(
    within: Within, order: Sequence[int], num_stages: int | None = None
) -> Route | None:
    """The best cut of those that are best of these stages in an order of their numbers, with
    `num_stages` if that is given."""
    num_layers, grow = within.times.problem.num_layers, Growth(within.band_SKV)
    # By number of stages; without a wish for it, the first pool holds them all.
    pools = [_Pool(len(order) + 1, within) for _ in range((num_stages or 0) + 1)]
    pools[0].add(_nothing(num_layers), None)
    for position, number in enumerate(order):
        for depth in range(min(num_stages or 1, position + 1), 0, -1):
            pool = pools[depth - 1]
            if not pool.lasts:
                continue
            before_V = np.minimum.reduce(pool.arriving(number), axis=0)
            cost_V = grow(before_V[None], within.band_SKV[number : number + 1])[0]
            if np.minimum.reduce(cost_V) < np.inf:
                last = _Last(number, before_V, pool, len(pool.lasts))
                pools[depth if num_stages else 0].add(cost_V, last)
    return pools[-1].best()


def _nothing(num_layers: int) -> Matrix:
    """No layers placed yet."""
    cost_V = np.full(num_layers + 1, np.inf)
    cost_V[0] = 0.0
    return cost_V


@dataclass(frozen=True, slots=True)
class _Last:
    """The last stage of partial routes, by its number."""

    number: int
    before_V: Matrix
    pool: _Pool
    count: int
    """So many of the pool it may go on from."""


class _Pool:
    """Partial routes, each the cheapest for any number of layers."""

    def __init__(self, most: int, within: Within) -> None:
        self.lasts: list[_Last | None] = []
        self._within = within
        self._cost_PV = np.empty((most, within.band_SKV.shape[2]))
        self._home_P = np.zeros(most, dtype=np.int64)

    def add(self, cost_V: Matrix, last: _Last | None) -> None:
        """`last` is None where there is no stage yet."""
        self._cost_PV[len(self.lasts)] = cost_V
        home = -1 if last is None else self._within.stages[last.number].home
        self._home_P[len(self.lasts)] = home
        self.lasts.append(last)

    def arriving(self, number: int, count: int | None = None) -> Matrix:
        """[P, V]: seconds to the home of a stage, of the first `count` alone if that is given."""
        home_P = self._home_P[: len(self.lasts) if count is None else count]
        way_P = self._within.hops[home_P, self._within.stages[number].home]
        way_P[home_P < 0] = 0.0
        found: Matrix = self._cost_PV[: len(home_P)] + way_P[:, None]
        return found

    def best(self) -> Route | None:
        """The least round trip of those with all layers."""
        return_s, stages = self._within.times.problem.return_s, self._within.stages
        whole = []
        for at, last in enumerate(self.lasts):
            if last is not None and self._cost_PV[at, -1] < np.inf:
                back_s = return_s[stages[last.number].home].min()
                whole.append((float(self._cost_PV[at, -1] + back_s), at, last))
        best: tuple[float, int, Route] | None = None
        for least_s, at, last in sorted(whole, key=lambda each: each[:2]):
            if best is not None and least_s * _SAFE > best[0]:
                break
            route = _route(self._within, last)
            if best is None or (route.round_trip_s, at) < best[:2]:
                best = route.round_trip_s, at, route
        return None if best is None else best[2]


def _route(within: Within, last: _Last | None) -> Route:
    stages: list[Stage] = []
    ends: list[int] = []
    end = within.times.problem.num_layers
    while last is not None:
        stages.insert(0, within.stages[last.number])
        ends.insert(0, end)
        end = start_of(last.before_V, within.band_SKV[last.number], end)
        costs_P = last.pool.arriving(last.number, last.count)[:, end]
        last = last.pool.lasts[int(costs_P.argmin())]
    return within.times.route(stages, ends)
