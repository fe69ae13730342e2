"""Improve a route by small steps where an exact search would take too long. Deterministic.

From the routes found without helpers for every number of micro-batches, and from the stages that
their bound consists of (where there is none, from each of the fastest devices alone with the
helpers that pay), one change at a time is kept when it makes the score better: a helper or a stage
more or less, another home, a stage merged into its neighbour. A budget of routes ends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise, permutations

import numpy as np

from .contest import Found
from .problem import Route, helpers_of
from .search import EXACT_PLACES, Search
from .stage_times import Stage

Order = tuple[Stage, ...]
MOST_ROUTES = 120
"""Routes that are tried from one start."""
_MOST_STARTS = 3
_NEAR = 0.9
"""Of what is known, which a route must have to be a start."""
_MOST_ORDERS = 120
"""Of stages that a bound consists of, all of five of them."""
_RISE = 0.01
"""What the bound of a number of micro-batches must promise, for steps to go from its stages."""
_MOST_MEMBERS = 8
_NEAREST = 4
"""Free devices that a stage may get: so many of the fastest, and of those reached soonest."""


def improved(
    searches: Sequence[Search],
    starts: Sequence[Found],
    *,
    throughput: bool,
    num_stages: int | None = None,
    floor: float = 0.0,
) -> list[Found]:
    """The best routes that small steps reach, one of each search at most, the best first; the
    starts themselves where the search over these problems was exact.

    `searches` are over one placement at several numbers of sequences per step, and `starts` what
    was found for some of them, the best first. Which of these is best says little of what helpers
    make of them, so that steps go from each. None may come back where nothing was found yet, or
    nothing better than `floor`, which somebody else has: then a third as much is tried.
    """
    if searches[0].is_exact:
        return list(starts)
    is_bounded = throughput and searches[0].outlook is not None
    most_routes = MOST_ROUTES // (3 if floor else 1) // (2 if is_bounded else 1)
    climbs = {
        search: _Climb(
            search, throughput=throughput, num_stages=num_stages, most_routes=most_routes
        )
        for search in searches
    }
    seeded = searches[: 0 if is_bounded else 1] if starts or floor else searches
    for search in seeded:
        for order in climbs[search].seeds() if num_stages in (None, 1) else ():
            climbs[search].climb(order)
    for search, route in starts:
        climbs[search].climb(_order(route))
    if is_bounded:
        best = max((each.score(each.best) for each in climbs.values() if each.best), default=0.0)
        for search, climb in climbs.items():
            ideal = climb.ideal() if search.most > best * (1 + _RISE) else None
            if ideal is not None:
                climb.climb(ideal)
    # What one number of micro-batches found may be better still with another.
    orders = dict.fromkeys(_order(each.best) for each in climbs.values() if each.best is not None)
    for climb in climbs.values() if throughput else ():
        for order in orders:
            climb.look_at(order)
    found = [(search, each.best) for search, each in climbs.items() if each.best is not None]
    return sorted(found, key=lambda each: -climbs[each[0]].score(each[1]))


def has_seed(search: Search, num_stages: int | None = None) -> bool:
    """Whether small steps have a place to begin where a search found nothing."""
    climb = _Climb(search, throughput=False, num_stages=num_stages, most_routes=0)
    return not search.is_exact and num_stages in (None, 1) and any(climb.seeds())


def _order(route: Route) -> Order:
    return tuple(Stage(*each) for each in zip(route.sites, route.members, strict=True))


class _Climb:
    """Steps over one problem, and the best route they came to."""

    def __init__(
        self, search: Search, *, throughput: bool, num_stages: int | None, most_routes: int
    ) -> None:
        self.problem, self._search = search.problem, search
        self.best: Route | None = None
        self._most_routes = most_routes
        self._throughput, self._num_stages = throughput, num_stages
        self._tried: set[Order] = set()
        sites = self.problem.sites
        seconds = np.array([site.seconds_L[-1] for site in sites])
        self._by_speed = [int(n) for n in np.argsort(seconds, kind="stable")]
        self._near = [
            sorted(self._by_speed, key=lambda other: self.problem.hop_s[site, other])
            for site in range(len(sites))
        ]

    def look_at(self, order: Order) -> None:
        """Keeps the best cut of an order if it is better than all before."""
        route = self._better_than(self.best, order)
        self.best = route or self.best

    def seeds(self) -> Iterator[Order]:
        """Each of the fastest devices alone, with helpers until the model fits."""
        whole = (0, self.problem.num_layers)
        is_pinned = any(site.span not in (None, whole) for site in self.problem.sites)
        if self.problem.shared is None or is_pinned:  # which leaves no stage all layers
            return
        for home in self._by_speed[:_MOST_STARTS]:
            stage = Stage.alone(home)
            for other in (n for n in self._by_speed if n != home and self.problem.may_help(n)):
                if self._fits(stage) or stage.members.bit_count() >= _MOST_MEMBERS:
                    break
                stage = Stage(home, stage.members | 1 << other)
            if self._fits(stage):
                yield (stage,)

    def ideal(self) -> Order | None:
        """The best order of stages that would have the most, were they as quick as a bound takes
        them to be, if it comes near to what is known."""
        near = _NEAR * self.score(self.best) if self.best and self._throughput else 0.0
        best: Route | None = None
        for stages in self._search.outlook.ideals() if self._search.outlook else ():
            if self._num_stages not in (None, len(stages)):
                continue
            route: Route | None = None
            orders = islice(permutations([Stage(*each) for each in stages]), _MOST_ORDERS)
            for order in sorted(orders, key=self._ways_s)[:_NEAREST]:
                route = self._better_than(route, order, floor=near) or route
            if route is not None and (best is None or self.score(route) > self.score(best)):
                best = route
        return None if best is None else _order(best)

    def _ways_s(self, order: Order) -> float:
        """Seconds between stages, and back."""
        homes, problem = [stage.home for stage in order], self.problem
        back_s = float(problem.return_s[homes[-1], homes[0]])
        return back_s + sum(float(problem.hop_s[a, b]) for a, b in pairwise(homes))

    def _fits(self, stage: Stage) -> bool:
        return bool(np.isfinite(self._search.times.stage_LL(stage)[0, -1]))

    def climb(self, order: Order) -> None:
        """Goes from the best cut of an order to where no step leads up; takes each that does."""
        now, left = self._better_than(None, order), self._most_routes
        is_rising = now is not None
        while is_rising and left > 0:
            is_rising = False
            for step in self._steps(order):
                if step in self._tried:
                    continue
                left -= 1
                self._tried.add(step)
                route = self._better_than(now, step)
                if route is not None:
                    now, order, is_rising = route, step, True
                    break
                if left <= 0:
                    break
        if now is not None and (self.best is None or self.score(now) > self.score(self.best)):
            self.best = now

    def _better_than(
        self, route: Route | None, order: Order, *, floor: float = 0.0
    ) -> Route | None:
        """The best cut of an order, if it is better than a route and has more than `floor`."""
        least = -math.inf
        if route is not None:
            least = self.score(route) + 1e-9 * abs(self.score(route))
        floor = max(floor, least)
        found = self._search.best_in_order(order, throughput=self._throughput, floor=floor)
        return found if found is not None and self.score(found) > least else None

    def score(self, route: Route) -> float:
        """More is better."""
        return route.tokens_per_s(self.problem) if self._throughput else -route.round_trip_s

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
