"""Find the devices, their order and their layers that make decoding fastest.

One dynamic programme serves both goals: the plan with the least round trip among those whose
stages and links all take at most a limit. Without a limit that is the answer for `latency`. For
`throughput` the score is ``min(step tokens / bottleneck, streams / round trip)``: the first grows
and the second falls as the limit shrinks, so that bisecting over the limit finds the best.

Over subsets the programme is exact: D[first, set, last][layers placed]. Beyond `EXACT_PLACES`
devices it runs along a few orders of the devices instead, each of which may be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

EXACT_PLACES = 8
"""Devices up to which all subsets are searched."""
Matrix: TypeAlias = "npt.NDArray[np.floating[Any]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A device with what its stages would cost. Arrays are prefix sums over layers, [L + 1]."""

    seconds_L: Matrix
    needs_L: Matrix
    """Bytes of the layers."""
    capacity: float
    """Bytes for them; less than any layer: of no use."""
    first_s: float = 0.0
    last_s: float = 0.0
    """Added to the first and the last stage of the model."""
    first_bytes: float = 0.0
    last_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One placement problem at one number of sequences per step."""

    sites: tuple[Site, ...]
    hop_s: Matrix
    """[i, j]: from a stage on i to the next on j."""
    return_s: Matrix
    """[i, j]: from the last stage on i back to the first on j."""
    transfer_s: Matrix
    """[i, j]: how long a step occupies the link from i to j."""
    step_tokens: int
    streams: int

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.sites[0].seconds_L) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Sites in pipeline order and the end layer of each."""

    sites: tuple[int, ...]
    ends: tuple[int, ...]
    round_trip_s: float
    bottleneck_s: float

    def tokens_per_s(self, problem: Problem) -> float:
        """What the throughput goal maximises."""
        return min(problem.step_tokens / self.bottleneck_s, problem.streams / self.round_trip_s)


def stage_s(site: Site, start: int, end: int, num_layers: int) -> float:
    """One decode step of the layers [start, end) on a site."""
    seconds = float(site.seconds_L[end] - site.seconds_L[start])
    return seconds + (start == 0) * site.first_s + (end == num_layers) * site.last_s


def evaluate(problem: Problem, sites: Sequence[int], ends: Sequence[int]) -> Route:
    """A given route with its times; memory is not checked."""
    starts = (0, *ends[:-1])
    stages = [
        stage_s(problem.sites[i], a, b, problem.num_layers)
        for i, a, b in zip(sites, starts, ends, strict=True)
    ]
    pairs = list(pairwise(sites))
    hops = [float(problem.hop_s[i, j]) for i, j in pairs]
    transfers = [float(problem.transfer_s[i, j]) for i, j in pairs]
    back = float(problem.return_s[sites[-1], sites[0]])
    return Route(
        sites=tuple(sites),
        ends=tuple(ends),
        round_trip_s=sum(stages) + sum(hops) + back,
        bottleneck_s=max(stages + transfers),
    )


def fastest(problem: Problem, *, num_stages: int | None = None) -> Route | None:
    """The least round trip; exactly `num_stages` stages if that is given. None: nothing fits."""
    return _Search(problem, num_stages).least()


def busiest(
    problem_of: Callable[[int], Problem], *, num_sites: int, num_stages: int | None = None
) -> tuple[Problem, Route] | None:
    """The most tokens per second, with the problem it was found for. None: nothing fits.

    `problem_of` gives the problem of a number of stages, which decides how many sequences a step
    has; so each number is a search of its own, cut short by what the others found.
    """
    best: tuple[float, Problem, Route] | None = None

    def offer(routes: Iterable[Route]) -> None:
        nonlocal best
        for route in routes:
            problem = problem_of(len(route.sites))
            route = evaluate(problem, route.sites, route.ends)
            score = route.tokens_per_s(problem)
            if best is None or score > best[0]:
                best = (score, problem, route)

    counts = [num_stages] if num_stages else list(range(1, num_sites + 1))
    is_exact = num_sites <= EXACT_PLACES
    for count in counts if is_exact or num_stages else [1 << k for k in range(7)]:
        search = _Search(problem_of(count), num_stages)
        offer(search.improvements(0.0, search.along_orders))
    if is_exact:
        for count in counts:
            search = _Search(problem_of(count), count)
            offer(search.improvements(best[0] if best else 0.0, search.over_subsets))
    return best and (best[1], best[2])


def best_in_order(
    problem: Problem, order: Sequence[int], *, throughput: bool = False
) -> Route | None:
    """The best cut with all sites of an order, in that order: the least round trip, or the most
    tokens per second. None: it does not fit."""
    search = _Search(problem, len(order))
    if not throughput:
        return search.along(order, math.inf)
    routes = list(search.improvements(0.0, lambda limit, _: search.along(order, limit)))
    return routes[-1] if routes else None


class _Front:
    """The cheapest partial routes that end on one site, by layers placed."""

    __slots__ = ("cost_L", "first", "members", "site", "source_L", "sources", "start_L")

    def __init__(self, cost_L: Matrix, *, site: int = -1, first: int = -1, members: int = 0):
        self.cost_L = cost_L
        self.site, self.first, self.members = site, first, members
        self.sources: Sequence[_Front] = ()
        self.source_L = self.start_L = _NOWHERE

    @classmethod
    def root(cls, num_layers: int) -> _Front:
        """Nothing placed yet."""
        cost = np.full(num_layers + 1, np.inf)
        cost[0] = 0.0
        return cls(cost)


_NOWHERE = np.zeros(0, dtype=np.int64)
_Least = Callable[[float, float], "Route | None"]


class _Search:
    """The programme over one problem; exactly `num_stages` stages, or as many as are best."""

    def __init__(self, problem: Problem, num_stages: int | None) -> None:
        self.problem = problem
        self.num_stages = num_stages
        # [u, v] of every site: seconds of layers [u, v), inf where they do not fit.
        self._stages = [_stage_matrix(site, problem.num_layers) for site in problem.sites]

    def least(self) -> Route | None:
        """The least round trip of all."""
        seed = self.along_orders(math.inf, math.inf)
        if len(self.problem.sites) > EXACT_PLACES:
            return seed
        return self.over_subsets(math.inf, seed.round_trip_s if seed else math.inf) or seed

    def improvements(self, floor: float, least: _Least) -> Iterator[Route]:
        """Routes of more throughput than `floor` and than all before, the best one last.

        ``least(limit, below)`` finds the least round trip under `below` whose stages and
        transfers take at most `limit`.
        """
        problem, best = self.problem, floor
        limits = self._limits()
        low, high = 0, len(limits) - 1
        while low <= high:
            middle = (low + high) // 2
            if best and limits[middle] >= problem.step_tokens / best:
                high = middle - 1
                continue
            below = problem.streams / best if best else math.inf
            route = least(limits[middle], below)
            if route is None:  # and smaller limits only have longer round trips
                low = middle + 1
                continue
            score = route.tokens_per_s(problem)
            if score > best:
                best = score
                yield route
            if problem.streams / route.round_trip_s >= problem.step_tokens / limits[middle]:
                high = middle - 1
            else:
                low = middle + 1

    def over_subsets(self, limit_s: float, below_s: float) -> Route | None:
        """Exact, over every set of sites in every order."""
        problem, num_layers = self.problem, self.problem.num_layers
        count = len(problem.sites)
        stages, hops = self._within(limit_s)
        rest, most = _least_rest(stages), _most_layers(stages)
        deepest = min(self.num_stages or count, num_layers, count)
        bound, best = below_s, None
        groups: dict[tuple[int, int], list[_Front]] = {(-1, 0): [_Front.root(num_layers)]}
        for depth in range(1, deepest + 1):
            grown: dict[tuple[int, int], list[_Front]] = {}
            for (first, members), fronts in groups.items():
                outside = [site for site in range(count) if not members >> site & 1]
                reach = sum(sorted(most[site] for site in outside)[-(deepest - depth + 1) :])
                for site in outside:
                    front = _extended(fronts, site, stages[site], hops)
                    if front is None:
                        continue
                    front.first = site if first < 0 else first
                    front.members = members | 1 << site
                    if self.num_stages in (None, depth):
                        back = problem.return_s[site, front.first]
                        if front.cost_L[-1] + back < bound:
                            bound, best = front.cost_L[-1] + back, front
                    # What cannot become better than the best, or cannot be completed, ends here.
                    front.cost_L[front.cost_L + rest >= bound] = np.inf
                    front.cost_L[: max(0, num_layers - reach + most[site])] = np.inf
                    if np.isfinite(front.cost_L[:-1]).any():
                        grown.setdefault((front.first, front.members), []).append(front)
            groups = grown
        return None if best is None else self._route(best)

    def along_orders(self, limit_s: float, below_s: float) -> Route | None:
        """The best along a few orders of the sites, any of which may be left out."""
        routes = [self.along(order, limit_s, skip=True) for order in self._orders()]
        found = [route for route in routes if route is not None and route.round_trip_s < below_s]
        return min(found, key=lambda route: route.round_trip_s, default=None)

    def along(self, order: Sequence[int], limit_s: float, *, skip: bool = False) -> Route | None:
        """The least round trip, but for the way back, along one order of sites."""
        num_layers = self.problem.num_layers
        stages, hops = self._within(limit_s)
        root = _Front.root(num_layers)
        # By number of stages; without a wish for it, the first list holds them all.
        pools: list[list[_Front]] = [[root], *([] for _ in range(self.num_stages or 0))]
        for position, site in enumerate(order):
            if not skip:
                sources = pools[position]
                front = _extended(sources, site, stages[site], hops) if sources else None
                if front is not None:
                    pools[position + 1].append(front)
            elif self.num_stages is None:
                front = _extended(pools[0], site, stages[site], hops)
                if front is not None:
                    pools[0].append(front)
            else:
                for depth in range(min(self.num_stages, position + 1), 0, -1):
                    sources = pools[depth - 1]
                    front = _extended(sources, site, stages[site], hops) if sources else None
                    if front is not None:
                        pools[depth].append(front)
        ended = [front for front in pools[self.num_stages or 0] if np.isfinite(front.cost_L[-1])]
        routes = [self._route(front) for front in ended if front is not root]
        return min(routes, key=lambda route: route.round_trip_s, default=None)

    def _within(self, limit_s: float) -> tuple[list[Matrix], Matrix]:
        stages = [np.where(matrix <= limit_s, matrix, np.inf) for matrix in self._stages]
        return stages, np.where(self.problem.transfer_s <= limit_s, self.problem.hop_s, np.inf)

    def _limits(self) -> list[float]:
        """Times that a bottleneck can have, ascending; all of them where the search is exact."""
        values = [matrix[np.isfinite(matrix)] for matrix in self._stages]
        every = np.unique(np.concatenate([*values, self.problem.transfer_s.ravel()]))
        if len(self.problem.sites) > EXACT_PLACES and len(every) > 512:
            every = every[np.linspace(0, len(every) - 1, 512).astype(int)]
        return [float(value) for value in every if value > 0]

    def _route(self, front: _Front) -> Route:
        sites: list[int] = []
        ends: list[int] = []
        end = self.problem.num_layers
        while front.site >= 0:
            sites.insert(0, front.site)
            ends.insert(0, end)
            end = int(front.start_L[end])
            front = front.sources[int(front.source_L[end])]
        return evaluate(self.problem, sites, ends)

    def _orders(self) -> Iterator[tuple[int, ...]]:
        """By speed, both ways, and along short links from the fastest sites."""
        problem = self.problem
        speed = [float(site.seconds_L[-1]) for site in problem.sites]
        useful = [number for number, matrix in enumerate(self._stages) if np.isfinite(matrix).any()]
        by_speed = sorted(useful, key=lambda number: (speed[number], number))
        yield tuple(by_speed)
        yield tuple(reversed(by_speed))
        for start in by_speed[:2]:
            order, left = [start], [number for number in by_speed if number != start]
            while left:
                near = min(left, key=lambda j: (problem.hop_s[order[-1], j], speed[j], j))
                order.append(near)
                left.remove(near)
            yield tuple(order)


def _extended(
    sources: Sequence[_Front], site: int, stage_LL: Matrix, hops: Matrix
) -> _Front | None:
    """The partial routes that go on from `sources` with a stage on `site`; None: none does."""
    # The hop depends on neither end of the stage, so the best source per start comes first.
    arriving = np.stack(
        [
            source.cost_L if source.site < 0 else source.cost_L + hops[source.site, site]
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
    front = _Front(total[chosen, np.arange(total.shape[1])], site=site)
    if not np.isfinite(front.cost_L).any():
        return None
    front.sources, front.source_L, front.start_L = tuple(sources), source_L, starts[chosen]
    return front


def _most_layers(stages: Sequence[Matrix]) -> list[int]:
    """The longest stage of every site."""
    layers = np.arange(len(stages[0]))
    spans = layers[None, :] - layers[:, None]
    return [int(np.where(np.isfinite(matrix), spans, 0).max()) for matrix in stages]


def _stage_matrix(site: Site, num_layers: int) -> Matrix:
    needs = site.needs_L[None, :] - site.needs_L[:, None]
    seconds = site.seconds_L[None, :] - site.seconds_L[:, None]
    needs[0] += site.first_bytes
    seconds[0] += site.first_s
    needs[:, -1] += site.last_bytes
    seconds[:, -1] += site.last_s
    layers = np.arange(num_layers + 1)
    fits = (needs <= site.capacity) & (layers[None, :] > layers[:, None])
    return np.where(fits, seconds, np.inf)


def _least_rest(stages: Sequence[Matrix]) -> Matrix:
    """A lower bound on the seconds of all layers from each on, whoever computes them."""
    num_layers = len(stages[0]) - 1
    cheapest = np.minimum.reduce(list(stages))
    layers = np.arange(num_layers + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        spans = layers[None, :] - layers[:, None]
        per_layer = np.where(spans > 0, cheapest / np.maximum(spans, 1), np.inf)
    least = float(per_layer.min())
    rest: Matrix = (num_layers - layers) * (least if math.isfinite(least) else 0.0)
    return rest
