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

import numpy as np

from .fronts import Front, Offer, Stage, least_rest
from .orders import likely_orders
from .problem import Matrix, Outlook, Problem, Route

EXACT_PLACES = 8
"""Devices up to which all subsets are searched."""
EXACT_SHARED = 5
"""Devices up to which all sets of helpers are searched too."""
_MOST_LIMITS = 512
_LEVEL = 0.93
_NUM_LEVELS = 12


def fastest(
    problem: Problem, *, num_stages: int | None = None, outlook: Outlook | None = None
) -> Route | None:
    """The least round trip; exactly `num_stages` stages if that is given. None: nothing fits."""
    search = Search(problem, outlook)
    seed = search.along_orders(math.inf, math.inf, num_stages)
    if search.exact_stages is None:
        return seed
    search.keep_hopeful(1 / seed.round_trip_s if seed else 0.0)
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
    searches = [Search(problem) for problem in problems]
    found = contenders(searches, num_stages=num_stages, floor=floor)
    return found[0] if found else None


def contenders(
    searches: Sequence[Search],
    *,
    num_stages: int | None = None,
    within: float = 0.0,
    floor: float = 0.0,
) -> list[tuple[Problem, Route]]:
    """The best route of every problem that has one `within` a share of the best of all, which is
    the first of them. Where the best has no more than `floor`, there may be none."""
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
        if search.most > least(number):
            offer(number, search.improvements(least(number), along(search), search.alone))
    left = [number for number, search in enumerate(searches) if search.exact_stages is not None]
    for level in _levels(searches):
        for number in tuple(left):
            search, low = searches[number], max(level, least(number))
            if low > level:
                left.remove(number)
            if search.most > low:
                search.keep_hopeful(low)
                offer(number, search.improvements(low, over(search)))
    order = sorted(best, key=lambda number: -best[number][0])
    return [
        (searches[number].problem, best[number][1])
        for number in order
        if best[number][0] >= best[order[0]][0] * (1 - within)
    ]


def _levels(searches: Sequence[Search]) -> Iterator[float]:
    """Scores to look for, from what may be down to none, so that few stages find a good route."""
    level = max((search.most for search in searches if search.is_exact), default=math.inf)
    yield from (level * _LEVEL**n for n in range(1, 1 + _NUM_LEVELS if level < math.inf else 0))
    yield 0.0


Least = Callable[[float, float], "Route | None"]
"""(limit, below): the least round trip under `below` whose stages and transfers take at most
`limit`; None: there is none."""


class Search:
    """The programme over one problem, which its outlook, where there is one, cuts short."""

    def __init__(self, problem: Problem, outlook: Outlook | None = None) -> None:
        self.problem, self.outlook = problem, outlook
        count = len(problem.sites)
        # [u, v] of every stage: seconds of layers [u, v), inf where they do not fit.
        self._stage_LL: dict[Stage, Matrix] = {}
        self._times_of: dict[Stage, Matrix] = {}
        self.alone = [Stage.alone(site) for site in range(count)]
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
            self.exact_stages = self.alone
        self._all_stages = self.exact_stages

    @property
    def most(self) -> float:
        """As `Outlook.most`; inf: nobody knows."""
        return math.inf if self.outlook is None else self.outlook.most

    def keep_hopeful(self, least: float) -> None:
        """Search exactly over stages of routes with at least so many tokens per second alone."""
        if self.outlook is not None and self._all_stages is not None and self.is_exact:
            kept = {Stage(*each) for each in self.outlook.hopeful(least)}
            self.exact_stages = [each for each in self._all_stages if each in kept]

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
        problem, best, limits = self.problem, floor, self._limits(stages)
        low, high = 0, len(limits) - 1
        if best:
            high = int(np.searchsorted(limits, problem.step_tokens / best)) - 1
        # Above a floor the largest limit comes first: mostly there is nothing, then, below it.
        middle = high if best else (low + high) // 2
        while low <= high:
            limit = float(limits[middle])
            below = problem.streams / best if best else math.inf
            route = least(limit, below)
            if route is None:  # and smaller limits only have longer round trips
                low = middle + 1
            else:
                score = route.tokens_per_s(problem)
                if score > best:
                    best = score
                    yield route
                if problem.streams / route.round_trip_s >= problem.step_tokens / limit:
                    high = middle - 1
                else:
                    low = middle + 1
            if best:
                high = min(high, int(np.searchsorted(limits, problem.step_tokens / best)) - 1)
            middle = (low + high) // 2

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
        offers = [Offer.of(stage, within[stage], nearest_N[stage.home]) for stage in stages]
        bound, best = below_s, None
        groups: dict[tuple[int, int], list[Front]] = {(-1, 0): [Front.root(num_layers)]}
        for depth in range(1, deepest + 1):
            grown: dict[tuple[int, int], list[Front]] = {}
            rests: dict[int, Matrix] = {}
            for (first, members), fronts in groups.items():
                outside = [stage for stage in stages if not stage.members & members]
                for stage in outside:
                    front = Front.extended(fronts, stage, within[stage], hops)
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
                        rests[front.members] = least_rest(left, num_layers, deepest - depth)
                    is_open = front.cost_L + rests[front.members] < bound
                    if is_open[:-1].any():
                        front.cost_L[~is_open] = np.inf
                        grown.setdefault((front.first, front.members), []).append(front)
            groups = grown
        return None if best is None else best.route(problem)

    def along_orders(
        self, limit_s: float, below_s: float, num_stages: int | None = None
    ) -> Route | None:
        """The best without helpers along a few orders of the sites; any may be left out."""
        useful = [each.home for each in self.alone if np.isfinite(self.stage_LL(each)).any()]
        routes = [
            self.along([self.alone[site] for site in order], limit_s, num_stages, skip=True)
            for order in likely_orders(self.problem, useful)
        ]
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
        root = Front.root(self.problem.num_layers)
        wanted = num_stages if skip else len(order)
        # By number of stages; without a wish for it, the first list holds them all.
        pools: list[list[Front]] = [[root], *([] for _ in range(wanted or 0))]
        for position, stage in enumerate(order):
            if wanted is None:
                depths: Sequence[int] = (0,)
            elif skip:
                depths = range(min(wanted, position + 1), 0, -1)
            else:
                depths = (position + 1,)
            for depth in depths:
                sources = pools[max(0, depth - 1)]
                front = Front.extended(sources, stage, within[stage], hops) if sources else None
                if front is not None:
                    pools[depth].append(front)
        ended = [front for front in pools[wanted or 0] if np.isfinite(front.cost_L[-1])]
        routes = [front.route(self.problem) for front in ended if front is not root]
        return min(routes, key=lambda route: route.round_trip_s, default=None)

    def best_in_order(
        self, order: Sequence[Stage], *, throughput: bool = False, floor: float = 0.0
    ) -> Route | None:
        """The best cut with all stages of an order, in that order: the least round trip, or the
        most tokens per second, if more than `floor`. None: it does not fit."""
        if not throughput:
            return self.along(order, math.inf)
        stages = [(stage.home, stage.members) for stage in order]
        if floor and self.outlook is not None and not self.outlook.may_yield(floor, stages):
            return None
        routes = list(self.improvements(floor, lambda limit, _: self.along(order, limit), order))
        return routes[-1] if routes else None

    def evened(self, route: Route, round_trip_s: float) -> Route:
        """The same stages in the same order, cut so that the slowest of them and of the transfers
        takes as little as it can in a round trip of at most `round_trip_s`."""
        order = [Stage(*each) for each in zip(route.sites, route.members, strict=True)]
        limits = self._limits(order)
        low, high = 0, int(np.searchsorted(limits, route.bottleneck_s)) - 1
        while low <= high:
            middle = (low + high) // 2
            found = self.along(order, float(limits[middle]))
            if found is not None and found.round_trip_s <= round_trip_s:
                route, high = found, middle - 1
            else:
                low = middle + 1
        return route

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

    def _times(self, stage: Stage) -> Matrix:
        """All that a stage can take."""
        if stage not in self._times_of:
            matrix = self.stage_LL(stage)
            self._times_of[stage] = np.unique(matrix[np.isfinite(matrix)])
        return self._times_of[stage]

    def _limits(self, stages: Sequence[Stage] | None) -> Matrix:
        """Times that a bottleneck can have, ascending; all of them where the search is exact."""
        chosen = stages or self.exact_stages or self.alone
        every = np.unique(
            np.concatenate([*map(self._times, chosen), self.problem.transfer_s.ravel()])
        )
        if (stages or not self.is_exact) and len(every) > _MOST_LIMITS:
            every = every[np.linspace(0, len(every) - 1, _MOST_LIMITS).astype(int)]
        found: Matrix = every[every > 0]
        return found
