"""Why the search left nodes out, by what using them would do."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import combinations

from ..search.cost import device_speed
from ..search.place import Place
from ..search.placing import Placing
from ..search.problem import Problem, Route, sites_of
from ..search.search import Search
from ..search.stage_times import Stage
from ..units import gigabytes, milliseconds

MAX_EXPLAINED = 8
"""Unused nodes of different kinds that are each planned with, to say what using them would do."""
_FEW = 4
"""Stages up to which any of them may make room for an unused node."""

Seat = tuple[str, str]
"""Host and device."""


def used_places(placing: Placing, route: Route) -> list[Place]:
    """The devices with a part in a route."""
    spans = zip(route.sites, route.members, strict=True)
    return [placing.places[site] for span in spans for site in sites_of(*span)]


def unused_hosts(
    placing: Placing, search: Search, now: Route, smallest_bytes: int, used: Collection[Seat]
) -> dict[Seat, str]:
    """Why each device that is not `used` has no part in the best route, `now`: what a route with it
    would do. A device that may help a stage in it is not used where none of the experts is."""
    seats = [(place.node.host, place.device_name) for place in placing.places]
    busy = sum(1 << number for number, seat in enumerate(seats) if seat in used)
    stages = [
        Stage(site, members & busy) for site, members in zip(now.sites, now.members, strict=True)
    ]
    problem = search.problem
    is_busy = placing.workload.objective == "throughput"
    told: dict[object, str] = {}
    reasons: dict[Seat, str] = {}
    for number, place in enumerate(placing.places):
        idle = seats[number]
        if idle in used:
            continue
        if place.usable_bytes < smallest_bytes:
            reasons[idle] = (
                f"too small: {gigabytes(place.usable_bytes)} usable, one layer takes "
                f"{gigabytes(smallest_bytes)}"
            )
            continue
        # Neighbours of different stages are alike if their ways are: what is told is of the first.
        links = tuple(
            sorted((problem.hop_s[number, site], problem.hop_s[site, number]) for site in now.sites)
        )
        speed = device_speed(place.device, placing.dtypes[number])
        kind = (speed, place.usable_bytes, links)
        if kind not in told:
            told[kind] = (
                _with(number, stages, search, now, is_busy=is_busy)
                if len(told) < MAX_EXPLAINED
                else _slower(number, now.sites, problem)
            )
        reasons[idle] = told[kind]
    return reasons


def _with(number: int, stages: list[Stage], search: Search, now: Route, *, is_busy: bool) -> str:
    """The best of a few routes with it; a whole search would take as long as that of the plan."""
    orders = list(_orders_with(search.alone[number], stages, search.alone))
    if is_busy:
        best, was = _most_tokens(search, orders), f"{now.tokens_per_s(search.problem):.1f}"
        told, then = f"{best:.1f} tokens/s", f"{best:.1f}"
    else:
        routes = [search.best_in_order(order) for order in orders]
        best = min((route.round_trip_s for route in routes if route is not None), default=0.0)
        was, then = milliseconds(now.round_trip_s), milliseconds(best)
        told = f"a token takes {then}"
    if not best:
        return "not needed: no split with one layer or more on it fits"
    return f"not needed: tried with it, {told}{' too' if then == was else f' in place of {was}'}"


def _most_tokens(search: Search, orders: Iterable[Sequence[Stage]]) -> float:
    """Per second in the best of these orders; 0 where none fits."""
    best = 0.0
    for order in orders:
        if not best or search.may_beat(best, order):
            route = search.best_in_order(order, throughput=True)
            best = max(best, route.tokens_per_s(search.problem) if route else 0.0)
    return best


def _orders_with(
    stage: Stage, others: Sequence[Stage], every: Sequence[Stage]
) -> Iterator[tuple[Stage, ...]]:
    """A stage beside others, in place of some of them, of any where they are few, and beside one
    of `every` alone."""
    for partner in every:
        if partner.home != stage.home:
            yield from ((stage, partner), (partner, stage))
    if len(others) <= _FEW:
        counts = range(len(others) + 1)
        kept = [rest for count in counts for rest in combinations(others, count)]
    else:
        kept = [(), tuple(others)]
        for at in range(len(others)):
            yield (*others[:at], stage, *others[at + 1 :])
    for rest in kept:
        for at in range(len(rest) + 1):
            yield (*rest[:at], stage, *rest[at:])


def _slower(number: int, sites: Sequence[int], problem: Problem) -> str:
    def per_layer(site: int) -> float:
        return float(problem.sites[site].seconds_L[-1]) / problem.num_layers

    used = sorted(per_layer(site) for site in sites)
    return (
        f"not needed: a layer takes {milliseconds(per_layer(number))} there, "
        f"{milliseconds(used[0])} to {milliseconds(used[-1])} on the nodes that are used"
    )
