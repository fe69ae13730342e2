"""Search one placement problem: routes of the least round trip, and of the most tokens per second.

One programme serves both goals: the plan with the least round trip among those whose stages and
links all take at most a limit. Without a limit that is the answer for `latency`. For `throughput`
the score is ``min(step tokens / bottleneck, streams / round trip)``: the first grows and the second
falls as the limit shrinks, so that bisecting over the limit finds the best.

Over subsets (`subsets.py`) the programme is exact, with every set of helpers up to `EXACT_SHARED`
devices and without helpers up to `EXACT_PLACES`. Beyond, it runs along a few orders of the devices
(`along.py`), each of which may be skipped, and `moves.py` goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np

from .along import least_with_all, least_with_some
from .orders import likely_orders
from .problem import Matrix, Outlook, Problem, Route
from .stage_times import Stage, StageTimes
from .subsets import least_trip

EXACT_PLACES = 8
"""Devices up to which all subsets are searched."""
EXACT_SHARED = 5
"""Devices up to which all sets of helpers are searched too."""
_MOST_LIMITS = 512

Least = Callable[[float, float], "Route | None"]
"""(limit, below): the least round trip under `below` whose stages and transfers take at most
`limit`; None: there is none."""


class Search:
    """The programme over one problem, which its outlook, where there is one, cuts short."""

    def __init__(self, problem: Problem, outlook: Outlook | None = None) -> None:
        self.problem, self.outlook = problem, outlook
        self.times = StageTimes(problem)
        count = len(problem.sites)
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
        self.proven_most = math.inf
        """Tokens per second that no route exceeds, as an exact search has found."""

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

    def fastest(self, num_stages: int | None = None) -> Route | None:
        """The least round trip; with `num_stages` stages if that is given. None: nothing fits."""
        seed = self.along_orders(math.inf, math.inf, num_stages)
        if self.exact_stages is None:
            return seed
        self.keep_hopeful(1 / seed.round_trip_s if seed else 0.0)
        below_s = seed.round_trip_s if seed else math.inf
        return self.over_subsets(math.inf, below_s, num_stages) or seed

    def is_possible(self, num_stages: int | None = None) -> bool:
        """Whether there is any route, as `fastest` would find it."""
        found = self.along_orders(math.inf, math.inf, num_stages)
        return (found or self.over_subsets(math.inf, math.inf, num_stages)) is not None

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
        if not self.exact_stages:
            return None
        return least_trip(self.times.within(self.exact_stages, limit_s), below_s, num_stages)

    def along_orders(
        self, limit_s: float, below_s: float, num_stages: int | None = None
    ) -> Route | None:
        """The best without helpers along a few orders of the sites; any may be left out."""
        if not self._useful:
            return None
        within = self.times.within(self._useful, limit_s)
        routes = [least_with_some(within, order, num_stages) for order in self._orders]
        found = [route for route in routes if route is not None and route.round_trip_s < below_s]
        return min(found, key=lambda route: route.round_trip_s, default=None)

    @cached_property
    def _useful(self) -> list[Stage]:
        """Those that may have layers, without helpers."""
        return [stage for stage in self.alone if len(self.times.every(stage))]

    @cached_property
    def _orders(self) -> list[list[int]]:
        """Of the useful ones, by their numbers."""
        homes = [stage.home for stage in self._useful]
        orders = likely_orders(self.problem, homes)
        return [[homes.index(home) for home in order] for order in orders]

    def best_in_order(
        self, order: Sequence[Stage], *, throughput: bool = False, floor: float = 0.0
    ) -> Route | None:
        """The best cut with all stages of an order, in that order: the least round trip, or the
        most tokens per second, if more than `floor`. None: it does not fit."""
        if not throughput:
            return least_with_all(self.times.within(order, math.inf))
        stages = [(stage.home, stage.members) for stage in order]
        if floor and self.outlook is not None and not self.outlook.may_yield(floor, stages):
            return None

        if floor and not self.may_beat(floor, order):
            return None

        def least(limit_s: float, _: float) -> Route | None:
            return least_with_all(self.times.within(order, limit_s))

        routes = list(self.improvements(floor, least, order))
        return routes[-1] if routes else None

    def may_beat(self, floor: float, order: Sequence[Stage]) -> bool:
        """Whether a cut with all stages of an order may have more tokens per second than that."""
        problem = self.problem
        route = least_with_all(self.times.within(order, problem.step_tokens / floor))
        return route is not None and problem.streams / route.round_trip_s > floor

    def evened(self, route: Route, round_trip_s: float) -> Route:
        """The same stages in the same order, cut so that the slowest of them and of the transfers
        takes as little as it can in a round trip of at most `round_trip_s`."""
        order = [Stage(*each) for each in zip(route.sites, route.members, strict=True)]
        limits = self._limits(order)
        low, high = 0, int(np.searchsorted(limits, route.bottleneck_s)) - 1
        while low <= high:
            middle = (low + high) // 2
            found = least_with_all(self.times.within(order, float(limits[middle])))
            if found is not None and found.round_trip_s <= round_trip_s:
                route, high = found, middle - 1
            else:
                low = middle + 1
        return route

    def _limits(self, stages: Sequence[Stage] | None) -> Matrix:
        """Times that a bottleneck can have, ascending; all of them where the search is exact."""
        chosen = stages or self.exact_stages or self.alone
        every = np.unique(
            np.concatenate([*map(self.times.every, chosen), self.problem.transfer_s.ravel()])
        )
        if (stages or not self.is_exact) and len(every) > _MOST_LIMITS:
            every = every[np.linspace(0, len(every) - 1, _MOST_LIMITS).astype(int)]
        found: Matrix = every[every > 0]
        return found
