"""Improve a route by small steps where an exact search would take too long. Deterministic.

From the route found along orders of devices, and from each of the fastest devices alone with the
helpers that pay, one change at a time is kept when it makes the score better: a helper or a stage
more or less, another home, a stage merged into its neighbour. A budget of routes ends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .fronts import Stage
from .problem import Problem, Route, helpers_of
from .search import EXACT_PLACES, Search

Order = tuple[Stage, ...]
MOST_ROUTES = 120
"""Routes that are tried from one start."""
_MOST_STARTS = 3
_MOST_MEMBERS = 8
_NEAREST = 4
"""Free devices that a stage may get: so many of the fastest, and of those reached soonest."""


def improved(
    problems: Sequence[Problem],
    start: tuple[Problem, Route] | None,
    *,
    throughput: bool,
    num_stages: int | None = None,
    floor: float = 0.0,
) -> tuple[Problem, Route] | None:
    """The best route that small steps reach from `start`; `start` itself where the search over
    these problems was exact. `start` belongs to one of `problems`; None: nothing was found yet,
    or nothing better than `floor`, which somebody else has: then a third as much is tried.
    """
    first = problems[0]
    if Search(first).is_exact:
        return start
    best = start
    climbs = [
        _Climb(
            problem,
            throughput=throughput,
            num_stages=num_stages,
            most_routes=MOST_ROUTES // (3 if floor else 1),
        )
        for problem in problems
    ]
    for climb in climbs if start is None and not floor else climbs[:1]:
        for order in climb.seeds() if num_stages in (None, 1) else ():
            best = _better(best, climb, climb.climb(order))
    if start is not None:
        problem, route = start
        climb = next(c for c in climbs if c.problem is problem)
        best = _better(best, climb, climb.climb(_order(route)))
    if best is not None and throughput:
        # What one number of micro-batches found may be better still with another.
        order = _order(best[1])
        for climb in climbs:
            best = _better(best, climb, climb.route(order))
    return best


def _order(route: Route) -> Order:
    return tuple(Stage(*each) for each in zip(route.sites, route.members, strict=True))


def _better(
    best: tuple[Problem, Route] | None, climb: _Climb, route: Route | None
) -> tuple[Problem, Route] | None:
    if route is None:
        return best
    if best is None or climb.score(route) > climb.scored(*best):
        return climb.problem, route
    return best


class _Climb:
    """Steps over one problem."""

    def __init__(
        self, problem: Problem, *, throughput: bool, num_stages: int | None, most_routes: int
    ) -> None:
        self.problem, self._most_routes = problem, most_routes
        self._throughput, self._num_stages = throughput, num_stages
        self._search = Search(problem)
        self._routes: dict[Order, Route | None] = {}
        self._tried: set[Order] = set()
        seconds = np.array([site.seconds_L[-1] for site in problem.sites])
        self._by_speed = [int(n) for n in np.argsort(seconds, kind="stable")]
        self._near = [
            sorted(self._by_speed, key=lambda other: problem.hop_s[site, other])
            for site in range(len(problem.sites))
        ]

    def score(self, route: Route) -> float:
        """More is better."""
        return self.scored(self.problem, route)

    def scored(self, problem: Problem, route: Route) -> float:
        """Of a route that was found for another problem."""
        return route.tokens_per_s(problem) if self._throughput else -route.round_trip_s

    def route(self, order: Order) -> Route | None:
        """The best cut of an order, remembered."""
        if order not in self._routes:
            found = self._search.best_in_order(order, throughput=self._throughput)
            self._routes[order] = found
        return self._routes[order]

    def seeds(self) -> Iterator[Order]:
        """Each of the fastest devices alone, with helpers until the model fits."""
        if self.problem.shared is None:
            return
        for home in self._by_speed[:_MOST_STARTS]:
            stage = Stage.alone(home)
            for other in (n for n in self._by_speed if n != home and self.problem.may_help(n)):
                if self.route((stage,)) is not None or stage.members.bit_count() >= _MOST_MEMBERS:
                    break
                stage = Stage(home, stage.members | 1 << other)
            if self.route((stage,)) is not None:
                yield (stage,)

    def climb(self, order: Order) -> Route | None:
        """The end of a climb that takes every step up at once."""
        best, left = self.route(order), self._most_routes
        is_rising = best is not None
        while is_rising and left > 0:
            is_rising = False
            for step in self._steps(order):
                if step in self._tried or step in self._routes:
                    continue
                left -= 1
                self._tried.add(step)
                route = self._search.best_in_order(
                    step,
                    throughput=self._throughput,
                    floor=0.0 if best is None else self.score(best),
                )
                if route is not None and (best is None or self._rises(route, best)):
                    best, order, is_rising = route, step, True
                    break
                if left <= 0:
                    break
        return best

    def _rises(self, route: Route, best: Route) -> bool:
        now = self.score(best)
        return self.score(route) > now + 1e-9 * abs(now)

    def _steps(self, order: Order) -> Iterator[Order]:
        used = 0
        for stage in order:
            used |= stage.members
        free = [site for site in self._by_speed if not used >> site & 1]
        shares = self.problem.shared is not None
        # Without helpers the search over few devices has found the best already.
        is_known = len(self.problem.sites) <= EXACT_PLACES
        for step in self._all_steps(order, free, shares=shares):
            if is_known and all(stage == Stage.alone(stage.home) for stage in step):
                continue
            if self._num_stages in (None, len(step)):
                yield step

    def _all_steps(self, order: Order, free: list[int], *, shares: bool) -> Iterator[Order]:
        for at, stage in enumerate(order):
            before, after = order[:at], order[at + 1 :]
            if len(order) > 1:
                yield (*before, *after)
            for other in free[:_NEAREST]:
                yield (*before, Stage.alone(other), *after)
            if at + 1 < len(order):
                yield (*before, order[at + 1], stage, *order[at + 2 :])
        for at in range(len(order) + 1):
            for other in free[:_NEAREST]:
                yield (*order[:at], Stage.alone(other), *order[at:])
        for at, stage in enumerate(order if shares else ()):
            before, after = order[:at], order[at + 1 :]
            helpful = [n for n in free if self.problem.may_help(n)]
            near = [n for n in self._near[stage.home] if n in helpful][:_NEAREST]
            for other in dict.fromkeys([*helpful[:_NEAREST], *near]):
                yield (*before, Stage(stage.home, stage.members | 1 << other), *after)
            for other in helpers_of(stage.home, stage.members):
                yield (*before, Stage(stage.home, stage.members & ~(1 << other)), *after)
                yield (*before, Stage(other, stage.members), *after)
            for other, neighbour in enumerate(order):
                if other == at:
                    continue
                merged = stage.members | neighbour.members
                rest = [s for s in order if s not in (stage, neighbour)]
                rest.insert(min(at, other), Stage(stage.home, merged))
                yield tuple(rest)
