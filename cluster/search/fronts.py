"""Partial routes, all at once: the cheapest ones that end on one stage, by layers placed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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

    __slots__ = ("cost_L", "first", "members", "source_L", "sources", "stage", "start_L")

    def __init__(self, cost_L: Matrix, *, stage: Stage | None = None):
        self.cost_L = cost_L
        self.stage = stage
        self.first, self.members = -1, 0
        self.sources: Sequence[Front] = ()
        self.source_L = self.start_L = _NOWHERE

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
            end = int(front.start_L[end])
            front = front.sources[int(front.source_L[end])]
        homes, members = ([each.home for each in stages], [each.members for each in stages])
        return evaluate(problem, homes, ends, members)


_NOWHERE = np.zeros(0, dtype=np.int64)


def extended(
    sources: Sequence[Front], stage: Stage, stage_LL: Matrix, hops: Matrix
) -> Front | None:
    """The partial routes that go on from `sources` with a stage; None: none does."""
    # The hop depends on neither end of the stage, so the best source per start comes first.
    arriving = np.stack(
        [
            source.cost_L
            if source.stage is None
            else source.cost_L + hops[source.stage.home, stage.home]
            for source in sources
        ]
    )
    source_L = arriving.argmin(axis=0)
    before_L = arriving[source_L, np.arange(arriving.shape[1])]
    starts = np.flatnonzero(np.isfinite(before_L[:-1]))
    if not len(starts):
        return None
    total = before_L[starts, None] + stage_LL[starts]
    chosen = total.argmin(axis=0)
    front = Front(total[chosen, np.arange(total.shape[1])], stage=stage)
    if not np.isfinite(front.cost_L).any():
        return None
    front.sources, front.source_L, front.start_L = tuple(sources), source_L, starts[chosen]
    return front


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
    each = [layer_s for layer_s, most in homes for _ in range(most)][:reach]
    # Sums of another order may be larger by some last digits.
    least = np.cumsum([0.0, *each[:num_layers]]) * (1 - 1e-12)
    rest = np.full(num_layers + 1, np.inf)
    rest[: len(least)] = least
    return rest[::-1]
