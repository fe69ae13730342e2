"""Find the devices, their order, layers and experts that make decoding fastest.

One dynamic programme serves both goals: the plan with the least round trip among those whose
stages and links all take at most a limit. Without a limit that is the answer for `latency`. For
`throughput` the score is ``min(step tokens / bottleneck, streams / round trip)``: the first grows
and the second falls as the limit shrinks, so that bisecting over the limit finds the best. How
many micro-batches the streams are cut into is tried from outside.

Over subsets the programme is exact: D[first, set, last][layers placed], with every set of helpers
up to `EXACT_SHARED` devices and without helpers up to `EXACT_PLACES`. Beyond, it runs along a few
orders of the devices, each of which may be skipped, and `moves.py` goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .problem import Matrix, Problem, Route, evaluate

EXACT_PLACES = 8
"""Devices up to which all subsets are searched."""
EXACT_SHARED = 5
"""Devices up to which all sets of helpers are searched too."""
_MOST_LIMITS = 512


@dataclass(frozen=True, slots=True)
class Stage:
    """A home and the members that share the experts of its layers, as a bit mask."""

    home: int
    members: int

    @classmethod
    def alone(cls, site: int) -> Stage:
        """All experts at home."""
        return cls(site, 1 << site)


def fastest(problem: Problem, *, num_stages: int | None = None) -> Route | None:
    """The least round trip; exactly `num_stages` stages if that is given. None: nothing fits."""
    search = Search(problem)
    seed = search.along_orders(math.inf, math.inf, num_stages)
    if search.exact_stages is None:
        return seed
    return (
        search.over_subsets(math.inf, seed.round_trip_s if seed else math.inf, num_stages) or seed
    )


def busiest(
    problems: Iterable[Problem], *, num_stages: int | None = None, floor: float = 0.0
) -> tuple[Problem, Route] | None:
    """The most tokens per second, with the problem it was found for. None: nothing fits, or has
    more than `floor`.

    `problems` are one placement at several numbers of sequences per step. Each is a search of its
    own, cut short by what the others found.
    """
    found = contenders(problems, num_stages=num_stages, floor=floor)
    return found[0] if found else None


def contenders(
    problems: Iterable[Problem],
    *,
    num_stages: int | None = None,
    within: float = 0.0,
    floor: float = 0.0,
) -> list[tuple[Problem, Route]]:
    """The best route of every problem that has one `within` a share of the best of all, which is
    the first of them. Where the best has no more than `floor`, there may be none."""
    searches = [Search(problem) for problem in problems]
    best: dict[int, tuple[float, Route]] = {}

    def least(number: int) -> float:
        most = max((floor, *(score for score, _ in best.values()))) * (1 - within)
        return max(most, best[number][0] if number in best else 0.0)

    def offer(number: int, routes: Iterable[Route]) -> None:
        for route in routes:
            best[number] = (route.tokens_per_s(searches[number].problem), route)

    def along(search: Search) -> Least:
        return lambda limit, below: search.along_orders(limit, below, num_stages)

    def over(search: Search) -> Least:
        return lambda limit, below: search.over_subsets(limit, below, num_stages)

    for number, search in enumerate(searches):
        offer(number, search.improvements(least(number), along(search)))
    for number, search in enumerate(searches):
        if search.exact_stages is not None:
            offer(number, search.improvements(least(number), over(search)))
    order = sorted(best, key=lambda number: -best[number][0])
    return [
        (searches[number].problem, best[number][1])
        for number in order
        if best[number][0] >= best[order[0]][0] * (1 - within)
    ]


class _Front:
    """The cheapest partial routes that end on one stage, by layers placed."""

    __slots__ = ("cost_L", "first", "members", "source_L", "sources", "stage", "start_L")

    def __init__(self, cost_L: Matrix, *, stage: Stage | None = None):
        self.cost_L = cost_L
        self.stage = stage
        self.first, self.members = -1, 0
        self.sources: Sequence[_Front] = ()
        self.source_L = self.start_L = _NOWHERE

    @classmethod
    def root(cls, num_layers: int) -> _Front:
        """Nothing placed yet."""
        cost = np.full(num_layers + 1, np.inf)
        cost[0] = 0.0
        return cls(cost)


_NOWHERE = np.zeros(0, dtype=np.int64)
Least = Callable[[float, float], "Route | None"]
"""(limit, below): the least round trip under `below` whose stages and transfers take at most
`limit`; None: there is none."""


class Search:
    """The programme over one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        count = len(problem.sites)
        # [u, v] of every stage: seconds of layers [u, v), inf where they do not fit.
        self._stage_LL: dict[Stage, Matrix] = {}
        self._alone = [Stage.alone(site) for site in range(count)]
        self.exact_stages: list[Stage] | None = None
        """All that an exact search has to try; None: too many devices for one."""
        if problem.shared is not None and count <= EXACT_SHARED:
            helpers = sum(1 << site for site in range(count) if problem.may_help(site))
            self.exact_stages = [
                Stage(home, members)
                for home in range(count)
                for members in range(1, 1 << count)
                if members >> home & 1 and not members & ~helpers & ~(1 << home)
            ]
        elif count <= EXACT_PLACES:
            self.exact_stages = self._alone

    @property
    def is_exact(self) -> bool:
        """Whether every route there is can be found, with helpers where there may be some."""
        most = EXACT_PLACES if self.problem.shared is None else EXACT_SHARED
        return len(self.problem.sites) <= most

    def stage_LL(self, stage: Stage) -> Matrix:
        """[u, v]: seconds of a stage with layers [u, v), inf where it does not fit."""
        if stage not in self._stage_LL:
            self._stage_LL[stage] = self.problem.stage_LL(stage.home, stage.members)
        return self._stage_LL[stage]

    def improvements(
        self, floor: float, least: Least, stages: Sequence[Stage] | None = None
    ) -> Iterator[Route]:
        """Routes of more throughput than `floor` and than all before, the best one last.

        `stages` are those that routes may consist of, if they are fewer than all.
        """
        problem, best = self.problem, floor
        limits = self._limits(stages)
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

    def over_subsets(
        self, limit_s: float, below_s: float, num_stages: int | None = None
    ) -> Route | None:
        """Exact, over every set of stages in every order."""
        problem, num_layers = self.problem, self.problem.num_layers
        assert self.exact_stages is not None
        count = len(problem.sites)
        within, hops = self._within(limit_s, self.exact_stages)
        stages = [stage for stage in self.exact_stages if np.isfinite(within[stage]).any()]
        if not stages:
            return None
        deepest = min(num_stages or count, num_layers, count)
        nearest_N = hops.min(axis=0, where=~np.eye(count, dtype=bool), initial=np.inf)
        offers = [_Offer.of(stage, within[stage], nearest_N[stage.home]) for stage in stages]
        bound, best = below_s, None
        groups: dict[tuple[int, int], list[_Front]] = {(-1, 0): [_Front.root(num_layers)]}
        for depth in range(1, deepest + 1):
            grown: dict[tuple[int, int], list[_Front]] = {}
            rests: dict[int, Matrix] = {}
            for (first, members), fronts in groups.items():
                outside = [stage for stage in stages if not stage.members & members]
                for stage in outside:
                    front = _extended(fronts, stage, within[stage], hops)
                    if front is None:
                        continue
                    front.first = stage.home if first < 0 else first
                    front.members = members | stage.members
                    if num_stages in (None, depth):
                        back = problem.return_s[stage.home, front.first]
                        if front.cost_L[-1] + back < bound:
                            bound, best = front.cost_L[-1] + back, front
                    # What cannot become better than the best, or cannot be completed, ends here.
                    if front.members not in rests:
                        left = [each for each in offers if not each.stage.members & front.members]
                        rests[front.members] = _least_rest(left, num_layers, deepest - depth)
                    front.cost_L[front.cost_L + rests[front.members] >= bound] = np.inf
                    if np.isfinite(front.cost_L[:-1]).any():
                        grown.setdefault((front.first, front.members), []).append(front)
            groups = grown
        return None if best is None else self._route(best)

    def along_orders(
        self, limit_s: float, below_s: float, num_stages: int | None = None
    ) -> Route | None:
        """The best without helpers along a few orders of the sites; any may be left out."""
        orders = self._orders()
        routes = [self.along(order, limit_s, num_stages, skip=True) for order in orders]
        found = [route for route in routes if route is not None and route.round_trip_s < below_s]
        return min(found, key=lambda route: route.round_trip_s, default=None)

    def along(
        self,
        order: Sequence[Stage],
        limit_s: float,
        num_stages: int | None = None,
        *,
        skip: bool = False,
    ) -> Route | None:
        """The least round trip, but for the way back, along one order of stages: with all of them,
        or with those that are best, `num_stages` if that is given."""
        within, hops = self._within(limit_s, order)
        root = _Front.root(self.problem.num_layers)
        wanted = num_stages if skip else len(order)
        # By number of stages; without a wish for it, the first list holds them all.
        pools: list[list[_Front]] = [[root], *([] for _ in range(wanted or 0))]
        for position, stage in enumerate(order):
            if wanted is None:
                depths: Sequence[int] = (0,)
            elif skip:
                depths = range(min(wanted, position + 1), 0, -1)
            else:
                depths = (position + 1,)
            for depth in depths:
                sources = pools[max(0, depth - 1)]
                front = _extended(sources, stage, within[stage], hops) if sources else None
                if front is not None:
                    pools[depth].append(front)
        ended = [front for front in pools[wanted or 0] if np.isfinite(front.cost_L[-1])]
        routes = [self._route(front) for front in ended if front is not root]
        return min(routes, key=lambda route: route.round_trip_s, default=None)

    def best_in_order(
        self, order: Sequence[Stage], *, throughput: bool = False, floor: float = 0.0
    ) -> Route | None:
        """The best cut with all stages of an order, in that order: the least round trip, or the
        most tokens per second, if more than `floor`. None: it does not fit."""
        if not throughput:
            return self.along(order, math.inf)
        routes = list(self.improvements(floor, lambda limit, _: self.along(order, limit), order))
        return routes[-1] if routes else None

    def _within(
        self, limit_s: float, stages: Sequence[Stage]
    ) -> tuple[dict[Stage, Matrix], Matrix]:
        if limit_s == math.inf:
            return {stage: self.stage_LL(stage) for stage in stages}, self.problem.hop_s
        within = {}
        for stage in stages:
            matrix = self.stage_LL(stage)
            within[stage] = np.where(matrix <= limit_s, matrix, np.inf)
        return within, np.where(self.problem.transfer_s <= limit_s, self.problem.hop_s, np.inf)

    def _limits(self, stages: Sequence[Stage] | None) -> list[float]:
        """Times that a bottleneck can have, ascending; all of them where the search is exact."""
        chosen = stages or self.exact_stages or self._alone
        values = []
        for stage in chosen:
            matrix = self.stage_LL(stage)
            values.append(np.unique(matrix[np.isfinite(matrix)]))
        every = np.unique(np.concatenate([*values, self.problem.transfer_s.ravel()]))
        if (stages or self.exact_stages is None) and len(every) > _MOST_LIMITS:
            every = every[np.linspace(0, len(every) - 1, _MOST_LIMITS).astype(int)]
        return [float(value) for value in every if value > 0]

    def _route(self, front: _Front) -> Route:
        stages: list[Stage] = []
        ends: list[int] = []
        end = self.problem.num_layers
        while front.stage is not None:
            stages.insert(0, front.stage)
            ends.insert(0, end)
            end = int(front.start_L[end])
            front = front.sources[int(front.source_L[end])]
        return evaluate(
            self.problem,
            [stage.home for stage in stages],
            ends,
            [stage.members for stage in stages],
        )

    def _orders(self) -> Iterator[tuple[Stage, ...]]:
        """By speed, both ways, and along short links from the fastest sites."""
        problem = self.problem
        speed = [float(site.seconds_L[-1]) for site in problem.sites]
        useful = [s.home for s in self._alone if np.isfinite(self.stage_LL(s)).any()]
        by_speed = sorted(useful, key=lambda number: (speed[number], number))
        orders = [by_speed, by_speed[::-1]]
        for start in by_speed[:2]:
            order, left = [start], [number for number in by_speed if number != start]
            while left:
                near = min(left, key=lambda j: (problem.hop_s[order[-1], j], speed[j], j))
                order.append(near)
                left.remove(near)
            orders.append(order)
        for order in orders:
            yield tuple(self._alone[number] for number in self._with_pins(order))

    def _with_pins(self, order: list[int]) -> list[int]:
        """Sites that must hold certain layers stand where these are, the others in their order."""
        spans = {site: self.problem.sites[site].span for site in order}
        others = [site for site in order if spans[site] is None]
        if len(others) == len(order):
            return order
        place = {site: (number + 0.5) / len(others) for number, site in enumerate(others)}
        for site, span in spans.items():
            if span is not None:
                ends = {0: -1.0, self.problem.num_layers: 2.0}
                middle = (span[0] + span[1]) / 2 / self.problem.num_layers
                place[site] = ends.get(span[0], ends.get(span[1], middle))
        return sorted(order, key=lambda site: place[site])


def _extended(
    sources: Sequence[_Front], stage: Stage, stage_LL: Matrix, hops: Matrix
) -> _Front | None:
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
    front = _Front(total[chosen, np.arange(total.shape[1])], stage=stage)
    if not np.isfinite(front.cost_L).any():
        return None
    front.sources, front.source_L, front.start_L = tuple(sources), source_L, starts[chosen]
    return front


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a stage can do for a pipeline at best."""

    stage: Stage
    layer_s: float
    """Seconds of a layer at least, with its part of the way there."""
    most_layers: int

    @classmethod
    def of(cls, stage: Stage, stage_LL: Matrix, way_s: float) -> _Offer:
        """Of a stage that may hold some layers, and that no hop reaches sooner than `way_s`."""
        starts, ends = np.nonzero(np.isfinite(stage_LL))
        spans = ends - starts
        layer_s = float(((stage_LL[starts, ends] + way_s) / spans).min())
        return cls(stage, layer_s, int(spans.max()))


def _least_rest(offers: Sequence[_Offer], num_layers: int, num_stages: int) -> Matrix:
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
