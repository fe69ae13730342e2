"""One pipeline where speeds are known: the search over the cost model for the best route."""

from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property, partial

from ..footprint import STEP_TOKENS
from ..machines import ComputeDtype, Inventory
from ..plan import Pipeline
from ..search.bound import least_round_trip_s, most_tokens_per_s
from ..search.ceiling import Ceiling
from ..search.contest import Found, contenders
from ..search.cost import device_speed
from ..search.loop import Run, loop_tokens_per_s
from ..search.mix import sizes
from ..search.moves import has_seed, improved
from ..search.place import Place
from ..search.placing import Placing
from ..search.problem import Route
from ..search.search import Search
from ..search.set_bounds import MOST_DEVICES, Outlook
from .memory_plan import num_kv_blocks
from .prediction import predicted
from .stage_plans import stage_plans
from .unused_hosts import Seat, unused_hosts, used_places

NEAR = 0.25
"""Share of the best score that a route may lack and still be a start for small steps, and the
choice where prompts make lumps."""
_LONGER = (0.01, 0.03)
"""Shares by which a round trip may be longer where that makes the slowest stage quicker."""
_WORTH = 1.02
"""What small steps must yield, against large ones, for a first token comes later with them."""
_MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)


def speeds_known(inventory: Inventory, dtype: ComputeDtype) -> bool:
    """Whether every node has a device whose speed is known; only then speeds decide."""
    return all(
        any(device_speed(device, dtype) is not None for device in node.devices)
        for node in inventory.nodes
    )


class SpeedPlanner:
    """The best pipeline on the places of a `Placing` for all of its streams, and what it should
    achieve; one of no more tokens per second than `floor` is not looked for."""

    def __init__(self, placing: Placing, *, floor: float = 0.0) -> None:
        self.places = placing.places
        self.placing = placing
        self._workload = placing.workload
        self.floor = floor
        self.streams = placing.workload.max_concurrency
        self._score = self._likely = 0.0
        self._size = STEP_TOKENS
        self._outlook = cache(partial(Outlook, placing))

    @cached_property
    def found(self) -> Found | None:
        """The best route, with the search that found it; None: nothing fits."""
        asked = self._workload.num_stages
        if not self.places:
            return None
        if self._workload.objective == "throughput":
            searches = self._searches
            starts = contenders(searches, num_stages=asked, within=NEAR, floor=self.floor)
            # Numbers of micro-batches that cannot come near are not looked at again.
            best = max(self.floor, max((_score(*each) for each in starts), default=0.0))
            searches = [each for each in searches if each.most > best * (1 - NEAR)]
            starts = [start for start in starts if start[0] in searches]
            if not searches:
                return None
            found = improved(searches, starts, throughput=True, num_stages=asked, floor=self.floor)
            return self._likeliest(found) if found else None
        search = self._search(1)
        route = search.fastest(asked)
        start = [] if route is None else [(search, route)]
        found = improved([search], start, throughput=False, num_stages=asked)
        return found[0] if found else None

    @property
    def is_possible(self) -> bool:
        """Whether any route is found."""
        if not Ceiling(self.placing).fits((1 << len(self.places)) - 1, self.streams):
            return False
        asked, is_busy = self._workload.num_stages, self._workload.objective == "throughput"
        searches = [Search(self.placing.problem(n)) for n in (self._batches() if is_busy else [1])]
        if is_busy and self._is_small and not searches[0].is_exact:
            # Bounds lead small steps to stages that nothing else does.
            return self.found is not None
        return any(each.is_possible(asked) or has_seed(each, asked) for each in searches)

    @cached_property
    def score(self) -> float:
        """Tokens per second of the best route, of the streams or of one alone; 0: nothing fits."""
        is_busy = self._workload.objective == "throughput"
        if is_busy and "found" not in self.__dict__ and Search(self.placing.problem(1)).is_exact:
            asked = self._workload.num_stages
            best = contenders(self._searches, num_stages=asked, floor=self.floor)
            return _score(*best[0]) if best else 0.0
        if self.found is None:
            return 0.0
        return self._score if is_busy else 1 / self.found[1].round_trip_s

    @cached_property
    def _searches(self) -> list[Search]:
        return [self._search(tokens) for tokens in self._batches()]

    def _search(self, tokens: int) -> Search:
        problem = self.placing.problem(tokens)
        # Without helpers the search over few devices is quick enough.
        has_outlook = self._is_small and problem.shared is not None
        return Search(problem, self._outlook(tokens) if has_outlook else None)

    @property
    def _is_small(self) -> bool:
        return len(self.places) <= MOST_DEVICES

    @property
    def is_exact(self) -> bool:
        """Whether the best route was found among all, or that there is none."""
        # The search takes all experts to be alike.
        if self._workload.popularity is not None or not self.placing.splits_are_exact:
            return False
        return Search(self.placing.problem(1)).is_exact

    @property
    def likely(self) -> float:
        """Tokens per second of the best route in the closed loop that it is for; 0: nothing fits,
        or the goal is another."""
        return 0.0 if self.found is None else self._likely

    @property
    def size(self) -> int:
        """Tokens of a step on the best route at most, prompts among them."""
        assert self.found is not None
        return self._size

    def _run(self, search: Search, route: Route, size: int) -> Run:
        tokens = search.problem.step_tokens
        calm_s, calm_ways_s = self.placing.step_s(route, decoded=tokens, tokens=tokens)
        full_s, full_ways_s = self.placing.step_s(route, decoded=tokens, tokens=size)
        return Run(
            streams=self.streams,
            micro_batches=-(-self.streams // tokens),
            sequences=tokens,
            size=size,
            calm_s=calm_s,
            full_s=full_s,
            calm_ways_s=calm_ways_s,
            full_ways_s=full_ways_s,
        )

    def _likeliest(self, found: Sequence[Found]) -> Found:
        """Of the first route and those nearly as good the one that yields most in the closed loop;
        of each it may be the evener cuts, too. Steps are large unless small ones pay."""
        self._score = _score(*found[0])
        near = [each for each in found if _score(*each) >= self._score * (1 - NEAR)]
        near += [
            (search, search.evened(route, route.round_trip_s * (1 + share)))
            for search, route in near
            for share in _LONGER
        ]
        runs = [(*each, size) for each in near for size in sizes(each[0].problem.step_tokens)]
        rates = loop_tokens_per_s([self._run(*each) for each in runs])
        worth = [
            rate / (_WORTH if size < STEP_TOKENS else 1)
            for rate, (*_, size) in zip(rates, runs, strict=True)
        ]
        best = worth.index(max(worth))
        self._likely, self._size = rates[best], runs[best][2]
        return runs[best][:2]

    def best_possible(self) -> float | None:
        """What no pipeline can beat (as `Plan.best_possible`); None where nobody can say."""
        assert self.found is not None
        search, route = self.found
        is_busy = self._workload.objective == "throughput"
        score = self._score if is_busy else route.round_trip_s
        if self._workload.popularity is not None:
            return None
        if self.is_exact:
            return score
        if is_busy:
            return self.bound(score)
        if self._is_small:
            return min(score, 1 / self._outlook(1).most)
        return least_round_trip_s(search.problem, score, num_stages=self._workload.num_stages)

    def bound(self, tokens_per_s: float, *, enough: float = 0.0) -> float:
        """What no pipeline goes beyond, or `tokens_per_s`, which some plan has, if that is more. Up
        to `enough` it may be loose."""
        if self._is_small:
            most = (self._outlook(tokens).most for tokens in self._batches())
            return max(tokens_per_s, *most)
        problems = [self.placing.problem(tokens) for tokens in self._batches()]
        asked = self._workload.num_stages
        return most_tokens_per_s(problems, tokens_per_s, num_stages=asked, enough=enough)

    def _batches(self) -> list[int]:
        """Sequences per step for every number of micro-batches that may pay, most first."""
        streams = self._workload.max_concurrency
        most = min(len(self.places) + 1, streams)
        counts = [count for count in _MICRO_BATCHES if count <= most]
        return sorted({-(-streams // count) for count in counts}, reverse=True)

    def used(self) -> list[Place]:
        """The devices of the best route."""
        assert self.found is not None
        return used_places(self.placing, self.found[1])

    def pipeline(self, threads: Mapping[str, int]) -> Pipeline:
        """The best route, with `threads` of each host for every device on it; times and blocks of
        keys and values are for the streams of the workload."""
        assert self.found is not None
        search, route = self.found
        problem, is_busy = search.problem, self._workload.objective == "throughput"
        placed = Pipeline(
            stages=stage_plans(self.placing, problem, route, threads),
            num_kv_blocks=num_kv_blocks(self._workload),
            max_concurrency=self.streams,
            num_micro_batches=-(-self.streams // problem.step_tokens) if is_busy else None,
            max_step_tokens=self.size if is_busy else None,
        )
        return predicted(self.placing, placed)

    def unused(self, smallest_bytes: int, used: Collection[Seat]) -> dict[Seat, str]:
        """As `unused_hosts`, of the best route."""
        assert self.found is not None
        return unused_hosts(self.placing, *self.found, smallest_bytes, used)


def _score(search: Search, route: Route) -> float:
    return route.tokens_per_s(search.problem)
