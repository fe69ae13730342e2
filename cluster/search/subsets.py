"""The least round trip over every set of stages in every order: an exact programme.

D[first home, members so far, last stage][layers placed], for all partial routes of as many stages
at once. What cannot become better than the best so far, or cannot be completed, ends early.

    S  stages      P  partial routes      G  groups of them, with the same first home and members
    N  homes       M  sets of members     K, V  as in `stage_times.py`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .expert_cost import Array
from .problem import Matrix, Route
from .stage_times import Growth, Stage, StageTimes, Within, start_of

_AT_ONCE = 1 << 18
"""Numbers of one temporary matrix."""


def least_trip(within: Within, below_s: float, num_stages: int | None = None) -> Route | None:
    """The route of least round trip under `below_s` out of stages, ordered by home, and hops under
    a limit; None: there is none."""
    usable = np.flatnonzero(np.isfinite(within.band_SKV).any(axis=(1, 2)))
    if not len(usable):
        return None
    problem, hops = within.times.problem, within.hops
    stages = [within.stages[number] for number in usable]
    offers = _Offers(stages, within.band_SKV[usable], hops)
    count, num_layers = len(problem.sites), problem.num_layers
    deepest = min(num_stages or count, num_layers, count)
    bound, best = below_s, None
    now = _Depth.root(num_layers)
    for depth in range(1, deepest + 1):
        grown = now.grown(offers, hops)
        if not len(grown.cost_PV):
            break
        bound_P = np.full(len(grown.cost_PV), bound)
        if num_stages in (None, depth):
            back_P = problem.return_s[offers.home_S[grown.stage_P], grown.first_P]
            whole_P = grown.cost_PV[:, -1] + back_P
            at = int(whole_P.argmin())
            if whole_P[at] < bound:
                best = grown, at
            np.minimum(bound_P, np.minimum.accumulate(whole_P), out=bound_P)
        if depth < deepest:
            now = grown.hopeful(offers.rest_PV(grown.members_P, deepest - depth), bound_P)
            bound = float(bound_P[-1])
    return None if best is None else best[0].route(best[1], within.times, offers, hops)


class _Offers:
    """The stages that there are, and what they can do for a pipeline at best."""

    def __init__(self, stages: Sequence[Stage], band_SKV: Matrix, hops: Matrix) -> None:
        self.stages, self.band_SKV = stages, band_SKV
        self.home_S = np.array([stage.home for stage in stages])
        self.members_S = np.array([stage.members for stage in stages])
        self._homes_at = np.flatnonzero(np.diff(self.home_S, prepend=-1))
        _, longest, num_ends = band_SKV.shape
        self.num_layers = num_ends - 1
        nearest_N = hops.min(axis=0, where=~np.eye(len(hops), dtype=bool), initial=np.inf)
        spans_K = np.arange(longest, 0, -1)
        way_s = nearest_N[self.home_S][:, None, None]
        # Seconds of a layer at least, with its part of the way there.
        self._layer_s = ((band_SKV + way_s) / spans_K[:, None]).min(axis=(1, 2))
        self._most_layers = longest - np.isfinite(band_SKV).any(axis=2).argmax(axis=1)

    def free(self, members: Array) -> Array:
        """[..., S]: whether a stage has none of these members."""
        found: Array = members[..., None] & self.members_S == 0
        return found

    def rest_PV(self, members_P: Array, num_stages: int) -> Matrix:
        """A lower bound on the seconds of all layers from v on, on so many stages without these
        members, one a home: were layers divisible, the cheapest would be filled first. inf: they
        cannot hold them."""
        members_M, set_P = np.unique(members_P, return_inverse=True)
        free_MS, at = self.free(members_M), self._homes_at
        layer_MN = np.minimum.reduceat(np.where(free_MS, self._layer_s, np.inf), at, axis=1)
        most_MN = np.maximum.reduceat(np.where(free_MS, self._most_layers, 0), at, axis=1)
        reach_M = np.sort(most_MN, axis=1)[:, -num_stages:].sum(axis=1)
        order_MN = np.lexsort((most_MN, layer_MN))
        layer_MN = np.take_along_axis(layer_MN, order_MN, axis=1)
        filled_MN = np.take_along_axis(most_MN, order_MN, axis=1).cumsum(axis=1)
        layers = np.arange(self.num_layers)
        home_ML = (filled_MN[:, None, :] <= layers[:, None]).sum(axis=2)
        is_held_ML = layers < reach_M[:, None]
        home_ML[~is_held_ML] = 0
        rest_MV = np.zeros((len(members_M), self.num_layers + 1))
        np.take_along_axis(layer_MN, home_ML, axis=1).cumsum(axis=1, out=rest_MV[:, 1:])
        rest_MV[:, 1:][~is_held_ML] = np.inf
        # Sums of another order may be larger by some last digits.
        found: Matrix = rest_MV[:, ::-1][set_P] * (1 - 1e-12)
        return found


@dataclass(frozen=True, slots=True)
class _Depth:
    """Partial routes of so many stages, sorted by group."""

    before: _Depth | None
    """Those that they go on from."""
    cost_PV: Matrix
    stage_P: Array
    home_P: Array
    from_P: Array
    """The group before."""
    first_P: Array
    members_P: Array
    starts_G: Array
    """The first partial route of each group."""

    @classmethod
    def root(cls, num_layers: int) -> _Depth:
        """Nothing placed yet."""
        cost_PV = np.full((1, num_layers + 1), np.inf)
        cost_PV[0, 0] = 0.0
        none, zero = np.array([-1]), np.array([0])
        return cls(None, cost_PV, none, none, none, none, zero, zero)

    def _arriving(self, hops: Matrix) -> Matrix:
        """[G, N, V]: the least seconds to every home."""
        if self.before is None:
            return np.broadcast_to(self.cost_PV[:, None, :], (1, len(hops), self.cost_PV.shape[1]))
        # The hop depends on neither end of the stage, so the best source per start comes first.
        arriving_PNV = self.cost_PV[:, None, :] + hops[self.home_P][:, :, None]
        found: Matrix = np.minimum.reduceat(arriving_PNV, self.starts_G, axis=0)
        return found

    def grown(self, offers: _Offers, hops: Matrix) -> _Depth:
        """All with one stage more."""
        members_G, first_G = self.members_P[self.starts_G], self.first_P[self.starts_G]
        from_P, stage_P = offers.free(members_G).nonzero()
        home_P = offers.home_S[stage_P]
        before_PV = self._arriving(hops)[from_P, home_P]
        cost_PV = np.empty_like(before_PV)
        step = min(max(1, _AT_ONCE // offers.band_SKV[0].size), len(from_P))
        grow = Growth(offers.band_SKV, step)
        for at in range(0, len(from_P), max(1, step)):
            some = slice(at, at + step)
            cost_PV[some] = grow(before_PV[some], offers.band_SKV[stage_P[some]])
        first_P = home_P if self.before is None else first_G[from_P]
        members_P = members_G[from_P] | offers.members_S[stage_P]
        return _Depth(self, cost_PV, stage_P, home_P, from_P, first_P, members_P, from_P[:0])

    def hopeful(self, rest_PV: Matrix, bound_P: Matrix) -> _Depth:
        """Those that may still become better than a bound, in groups."""
        is_open_PV = self.cost_PV + rest_PV < bound_P[:, None]
        kept = np.flatnonzero(is_open_PV[:, :-1].any(axis=1))
        groups = self.first_P[kept] << 32 | self.members_P[kept]
        _, seen_at, group_P = np.unique(groups, return_index=True, return_inverse=True)
        # In the order in which groups were found first, which decides ties.
        rank_P = seen_at[group_P]
        order = np.argsort(rank_P, kind="stable")
        kept, rank_P = kept[order], rank_P[order]
        return _Depth(
            self.before,
            np.where(is_open_PV[kept], self.cost_PV[kept], np.inf),
            self.stage_P[kept],
            self.home_P[kept],
            self.from_P[kept],
            self.first_P[kept],
            self.members_P[kept],
            np.flatnonzero(np.diff(rank_P, prepend=-1)),
        )

    def route(self, at: int, times: StageTimes, offers: _Offers, hops: Matrix) -> Route:
        """The one with all layers that ends with a partial route."""
        stages: list[Stage] = []
        ends: list[int] = []
        depth, end = self, offers.num_layers
        while depth.before is not None:
            before, stage = depth.before, int(depth.stage_P[at])
            stages.insert(0, offers.stages[stage])
            ends.insert(0, end)
            starts_G, group = before.starts_G, int(depth.from_P[at])
            last = starts_G[group + 1] if group + 1 < len(starts_G) else len(before.cost_PV)
            some = slice(starts_G[group], last)
            cost_PV = before.cost_PV[some]
            if before.before is not None:
                cost_PV = cost_PV + hops[before.home_P[some], depth.home_P[at], None]
            end = start_of(cost_PV.min(axis=0), offers.band_SKV[stage], end)
            at = int(starts_G[group]) + int(cost_PV[:, end].argmin())
            depth = before
        return times.route(stages, ends)
