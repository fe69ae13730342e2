"""Partial routes, all at once: the cheapest ones that end on one stage, by layers placed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from .problem import Matrix, Problem, Route, evaluate


@dataclass(frozen=True, slots=True)
class Stage:
    """A home and the members that share the experts of its layers, as a bit mask."""

    home: int
    members: int

    @classmethod
    def alone(cls, site: int) -> Stage:
        """All experts at home."""
        return cls(site, 1 << site)


class Front:
    """The cheapest partial routes that end on one stage, by layers placed."""

    __slots__ = (
        "_before_L",
        "_sources",
        "_stage_LL",
        "_ways_s",
        "cost_L",
        "first",
        "members",
        "stage",
    )

    def __init__(self, cost_L: Matrix, *, stage: Stage | None = None):
        self.cost_L = cost_L
        self.stage = stage
        self.first, self.members = -1, 0
        self._sources: Sequence[Front] = ()
        self._ways_s: Sequence[float] = ()
        self._before_L = self._stage_LL = cost_L

    @classmethod
    def root(cls, num_layers: int) -> Front:
        """Nothing placed yet."""
        cost = np.full(num_layers + 1, np.inf)
        cost[0] = 0.0
        return cls(cost)

    def route(self, problem: Problem) -> Route:
        """The one that has all layers of a problem."""
        stages: list[Stage] = []
        ends: list[int] = []
        front, end = self, problem.num_layers
        while front.stage is not None:
            stages.insert(0, front.stage)
            ends.insert(0, end)
            front, end = front._before(end)
        homes, members = ([each.home for each in stages], [each.members for each in stages])
        return evaluate(problem, homes, ends, members)

    @classmethod
    def extended(
        cls, sources: Sequence[Front], stage: Stage, stage_LL: Matrix, hops: Matrix
    ) -> Front | None:
        """The partial routes that go on from `sources` with a stage; None: none does."""
        ways_s = [
            0.0 if source.stage is None else hops[source.stage.home, stage.home]
            for source in sources
        ]
        # The hop depends on neither end of the stage, so the best source per start comes first.
        arriving = [source.cost_L + way for source, way in zip(sources, ways_s, strict=True)]
        before_L = reduce(np.minimum, arriving)
        starts = (before_L[:-1] < np.inf).nonzero()[0]
        if not len(starts):
            return None
        first, last = starts[0], starts[-1] + 1
        total = stage_LL[first:last, first + 1 :] + before_L[first:last, None]
        cost_L = np.empty_like(before_L)
        cost_L[: first + 1] = np.inf
        np.minimum.reduce(total, axis=0, out=cost_L[first + 1 :])
        if np.minimum.reduce(cost_L) == np.inf:
            return None
        front = cls(cost_L, stage=stage)
        front._sources, front._ways_s = tuple(sources), ways_s
        front._before_L, front._stage_LL = before_L, stage_LL
        return front

    def _before(self, end: int) -> tuple[Front, int]:
        """What the cheapest one with so many layers goes on from. Few routes are ever asked."""
        start = int((self._before_L + self._stage_LL[:, end]).argmin())
        costs = [
            source.cost_L[start] + way
            for source, way in zip(self._sources, self._ways_s, strict=True)
        ]
        return self._sources[costs.index(min(costs))], start


@dataclass(frozen=True, slots=True)
class Offer:
    """What a stage can do for a pipeline at best."""

    stage: Stage
    layer_s: float
    """Seconds of a layer at least, with its part of the way there."""
    most_layers: int

    @classmethod
    def of(cls, stage: Stage, stage_LL: Matrix, way_s: float) -> Offer:
        """Of a stage that may hold some layers, and that no hop reaches sooner than `way_s`."""
        starts, ends = np.nonzero(np.isfinite(stage_LL))
        spans = ends - starts
        layer_s = float(((stage_LL[starts, ends] + way_s) / spans).min())
        return cls(stage, layer_s, int(spans.max()))


def least_rest(offers: Sequence[Offer], num_layers: int, num_stages: int) -> Matrix:
    """[v]: a lower bound on the seconds of all layers from v on, on so many of these stages, one a
    home: were layers divisible, the cheapest would be filled first. inf: they cannot hold them."""
    by_home: dict[int, tuple[float, int]] = {}
    for offer in offers:
        layer_s, most = by_home.get(offer.stage.home, (math.inf, 0))
        best = min(layer_s, offer.layer_s), max(most, offer.most_layers)
        by_home[offer.stage.home] = best
    homes = sorted(by_home.values())
    reach = sum(sorted(most for _, most in homes)[-num_stages:]) if num_stages else 0
    seconds = np.array([layer_s for layer_s, _ in homes])
    counts = np.array([most for _, most in homes], dtype=np.int64)
    each = np.repeat(seconds, counts)[: min(reach, num_layers)]
    rest = np.full(num_layers + 1, np.inf)
    rest[0] = 0.0
    each.cumsum(out=rest[1 : 1 + len(each)])
    # Sums of another order may be larger by some last digits.
    found: Matrix = rest[::-1] * (1 - 1e-12)
    return found
