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
from .stage_times import Stage, StageTimes, start_of, with_stage

_SAFE = 1 - 1e-9
"""Of a sum that is compared with one of another order."""


def least_with_all(times: StageTimes, order: Sequence[Stage], limit_s: float) -> Route | None:
    """The best cut of an order, with stages and transfers of at most `limit_s`."""
    hops = times.hops(limit_s)
    cost_V = _nothing(times.problem.num_layers)
    steps = []
    for number, stage in enumerate(order):
        if number:
            cost_V = cost_V + hops[order[number - 1].home, stage.home]
        band_KV = times.band_KV(stage, limit_s)
        steps.append((cost_V, band_KV))
        cost_V = with_stage(cost_V, band_KV)
    if cost_V[-1] == np.inf:
        return None
    ends = [len(cost_V) - 1]
    for before_V, band_KV in reversed(steps[1:]):
        ends.insert(0, start_of(before_V, band_KV, ends[0]))
    return times.route(order, ends)


def least_with_some(
    times: StageTimes, order: Sequence[Stage], limit_s: float, num_stages: int | None = None
) -> Route | None:
    """The best cut of those stages of an order that are best, `num_stages` if that is given."""
    hops, num_layers = times.hops(limit_s), times.problem.num_layers
    # By number of stages; without a wish for it, the first pool holds them all.
    pools = [_Pool(len(order) + 1, num_layers) for _ in range((num_stages or 0) + 1)]
    pools[0].add(_nothing(num_layers), None)
    for position, stage in enumerate(order):
        band_KV = times.band_KV(stage, limit_s)
        for depth in range(min(num_stages or 1, position + 1), 0, -1):
            pool = pools[depth - 1]
            if not pool.lasts:
                continue
            before_V = pool.arriving(stage, hops).min(axis=0)
            cost_V = with_stage(before_V, band_KV)
            if np.minimum.reduce(cost_V) < np.inf:
                last = _Last(stage, band_KV, before_V, pool, len(pool.lasts))
                pools[depth if num_stages else 0].add(cost_V, last)
    return pools[-1].best(times, hops)


def _nothing(num_layers: int) -> Matrix:
    """No layers placed yet."""
    cost_V = np.full(num_layers + 1, np.inf)
    cost_V[0] = 0.0
    return cost_V


@dataclass(frozen=True, slots=True)
class _Last:
    """The last stage of partial routes."""

    stage: Stage
    band_KV: Matrix
    before_V: Matrix
    pool: _Pool
    count: int
    """So many of the pool it may go on from."""


class _Pool:
    """Partial routes, each the cheapest for any number of layers."""

    def __init__(self, most: int, num_layers: int) -> None:
        self.lasts: list[_Last | None] = []
        self._cost_PV = np.empty((most, num_layers + 1))
        self._home_P = np.zeros(most, dtype=np.int64)

    def add(self, cost_V: Matrix, last: _Last | None) -> None:
        """`last` is None where there is no stage yet."""
        self._cost_PV[len(self.lasts)] = cost_V
        self._home_P[len(self.lasts)] = -1 if last is None else last.stage.home
        self.lasts.append(last)

    def arriving(self, stage: Stage, hops: Matrix, count: int | None = None) -> Matrix:
        """[P, V]: seconds to the home of a stage."""
        count = len(self.lasts) if count is None else count
        home_P = self._home_P[:count]
        way_P = np.where(home_P < 0, 0.0, hops[home_P, stage.home])
        found: Matrix = self._cost_PV[:count] + way_P[:, None]
        return found

    def best(self, times: StageTimes, hops: Matrix) -> Route | None:
        """The least round trip of those with all layers."""
        whole = []
        for number, last in enumerate(self.lasts):
            if last is not None and self._cost_PV[number, -1] < np.inf:
                back_s = times.problem.return_s[last.stage.home].min()
                whole.append((float(self._cost_PV[number, -1] + back_s), number, last))
        best: tuple[float, int, Route] | None = None
        for least_s, number, last in sorted(whole, key=lambda each: each[:2]):
            if best is not None and least_s * _SAFE > best[0]:
                break
            route = _route(last, times, hops)
            if best is None or (route.round_trip_s, number) < best[:2]:
                best = route.round_trip_s, number, route
        return None if best is None else best[2]


def _route(last: _Last | None, times: StageTimes, hops: Matrix) -> Route:
    stages: list[Stage] = []
    ends: list[int] = []
    end = times.problem.num_layers
    while last is not None:
        stages.insert(0, last.stage)
        ends.insert(0, end)
        end = start_of(last.before_V, last.band_KV, end)
        costs_P = last.pool.arriving(last.stage, hops, last.count)[:, end]
        last = last.pool.lasts[int(costs_P.argmin())]
    return times.route(stages, ends)
