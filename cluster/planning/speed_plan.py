"""One pipeline where speeds are known: the search over the cost model, and what it predicts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from ..plan import (
    ComputeDtype,
    ExpertHost,
    ExpertIds,
    Inventory,
    Pipeline,
    Prediction,
    StagePlan,
)
from ..search.bound import least_round_trip_s, most_tokens_per_s
from ..search.cost import assumed_link, device_speed, hop_s
from ..search.fronts import Stage
from ..search.lumps import tokens_per_s_in_lumps
from ..search.moves import improved
from ..search.place import Place
from ..search.placing import PROMPT_TOKENS, Placing, helpers_of
from ..search.problem import Problem, Route, evaluate
from ..search.search import Search, busiest, contenders, fastest
from ..units import gigabytes, milliseconds
from .expert_hosts import add_copies, choose_experts
from .memory_plan import num_kv_blocks
from .popular_times import popular_stage_s

PREFILL_TOKENS = 1024
"""Length of the prompt whose time to the first token is predicted."""
MAX_EXPLAINED = 8
"""Unused nodes of different kinds that are each planned with, to say what using them would do."""
_NEAR = 0.07
"""Share of the best score that a route may lack and still be looked at more closely."""
_LONGER = (0.01, 0.03)
"""Shares by which a round trip may be longer where that makes the slowest stage quicker."""
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
        self._score = 0.0

    @cached_property
    def found(self) -> tuple[Problem, Route] | None:
        """The best route, with the problem it was found for; None: nothing fits."""
        asked = self._workload.num_stages
        if not self.places:
            return None
        if self._workload.objective == "throughput":
            problems = [self.placing.problem(tokens) for tokens in self._batches()]
            near = contenders(problems, num_stages=asked, within=_NEAR, floor=self.floor)
            best = improved(
                problems,
                near[0] if near else None,
                throughput=True,
                num_stages=asked,
                floor=self.floor,
            )
            return None if best is None else self._in_lumps([best, *near])
        problem = self.placing.problem(1)
        route = fastest(problem, num_stages=asked)
        start = None if route is None else (problem, route)
        return improved([problem], start, throughput=False, num_stages=asked)

    @cached_property
    def score(self) -> float:
        """Tokens per second of the best route, of the streams or of one alone; 0: nothing fits."""
        is_busy = self._workload.objective == "throughput"
        if is_busy and "found" not in self.__dict__ and Search(self.placing.problem(1)).is_exact:
            problems = [self.placing.problem(tokens) for tokens in self._batches()]
            best = busiest(problems, num_stages=self._workload.num_stages, floor=self.floor)
            return 0.0 if best is None else best[1].tokens_per_s(best[0])
        if self.found is None:
            return 0.0
        return self._score if is_busy else 1 / self.found[1].round_trip_s

    @property
    def is_exact(self) -> bool:
        """Whether the best route was found among all, or that there is none."""
        # The search takes all experts to be alike.
        if self._workload.popularity is not None or not self.placing.splits_are_exact:
            return False
        return Search(self.placing.problem(1)).is_exact

    def in_lumps(self) -> float:
        """Tokens per second of the best route where prompts come in whole chunks."""
        return 0.0 if self.found is None else self._lumpy(*self.found)

    def _lumpy(self, problem: Problem, route: Route) -> float:
        tokens = problem.step_tokens
        calm, chunks = self.placing.calm.problem(tokens), self.placing.chunks(tokens)
        return tokens_per_s_in_lumps(problem, route, calm, chunks)

    def _in_lumps(self, found: list[tuple[Problem, Route]]) -> tuple[Problem, Route]:
        """Of the first route and those nearly as good the one that prompts hold up least; of each
        it may be the evener cuts, too."""
        problem, route = found[0]
        self._score = route.tokens_per_s(problem)
        near = [
            (problem, route)
            for problem, route in found
            if route.tokens_per_s(problem) >= self._score * (1 - _NEAR)
        ]
        near += [
            (problem, Search(problem).evened(route, route.round_trip_s * (1 + share)))
            for problem, route in near
            for share in _LONGER
        ]
        return max(near, key=lambda each: self._lumpy(*each))

    def best_possible(self) -> float | None:
        """What no pipeline can beat (as `Plan.best_possible`); None where nobody can say."""
        assert self.found is not None
        problem, route = self.found
        is_busy = self._workload.objective == "throughput"
        score = self._score if is_busy else route.round_trip_s
        if self._workload.popularity is not None:
            return None
        if self.is_exact:
            return score
        if is_busy:
            return self.bound(score)
        return least_round_trip_s(problem, score, num_stages=self._workload.num_stages)

    def bound(self, tokens_per_s: float) -> float:
        """What no pipeline goes beyond, or `tokens_per_s`, which some plan has, if that is more."""
        problems = [self.placing.problem(tokens) for tokens in self._batches()]
        return most_tokens_per_s(problems, tokens_per_s, num_stages=self._workload.num_stages)

    def _batches(self) -> list[int]:
        """Sequences per step for every number of micro-batches that may pay, most first."""
        streams = self._workload.max_concurrency
        most = min(len(self.places) + 1, streams)
        counts = [count for count in _MICRO_BATCHES if count <= most]
        return sorted({-(-streams // count) for count in counts}, reverse=True)

    def used(self) -> list[Place]:
        """The devices of the best route."""
        assert self.found is not None
        route = self.found[1]
        spans = zip(route.sites, route.members, strict=True)
        return [self.places[site] for span in spans for site in _sites(*span)]

    def pipeline(self, threads: Mapping[str, int]) -> Pipeline:
        """The best route, with `threads` of each host for every device on it; times and blocks of
        keys and values are for the streams of the workload."""
        assert self.found is not None
        problem, route = self.found
        spans = list(zip(route.sites, route.members, route.starts, route.ends, strict=True))
        shares = [self._shares(problem, *span) for span in spans]
        stages = tuple(
            self._stage(number, *span, share, problem.num_layers, threads)
            for number, (span, share) in enumerate(zip(spans, shares, strict=True))
        )
        streams = self.streams
        is_busy = self._workload.objective == "throughput"
        placed = Pipeline(
            stages=stages,
            num_kv_blocks=num_kv_blocks(self._workload),
            max_concurrency=streams,
            num_micro_batches=-(-streams // problem.step_tokens) if is_busy else None,
        )
        return self.predicted(placed)

    def _stage(
        self,
        number: int,
        home: int,
        members: int,
        start: int,
        end: int,
        shares: list[ExpertIds],
        num_layers: int,
        threads: Mapping[str, int],
    ) -> StagePlan:
        placing, place = self.placing, self.places[home]
        cost, weights = placing.cost(home), placing.weights[placing.dtypes[home]]
        layers = range(start, end)

        def weight(experts: ExpertIds) -> int:
            return sum(
                cost.expert_bytes[layer] * len(ids)
                for layer, ids in zip(layers, experts, strict=True)
            )

        own, *others = shares or [()]
        held = sum(weights.layer_bytes[start:end])
        if shares:
            held = sum(cost.attention_bytes[start:end]) + weight(own)
        held += (start == 0) * weights.embeddings_bytes
        held += (end == num_layers) * weights.output_bytes
        kv_bytes = len(layers) * placing.kv_bytes
        helpers = []
        for other, experts in zip(helpers_of(home, members), others, strict=True):
            there, taken = self.places[other], weight(experts)
            free = there.device.memory_bytes - taken - placing.helper_overhead_bytes(home)
            if any(experts):
                helpers.append(
                    ExpertHost(
                        host=there.node.host,
                        device=there.device_name,
                        num_threads=threads[there.node.host],
                        weights_bytes=taken,
                        free_bytes=free,
                        experts=experts,
                    )
                )
        return StagePlan(
            index=number,
            host=place.node.host,
            device=place.device_name,
            first_layer=start,
            end_layer=end,
            has_embeddings=start == 0,
            has_output=end == num_layers,
            dtype=placing.dtypes[home],
            num_threads=threads[place.node.host],
            weights_bytes=held,
            kv_bytes=kv_bytes,
            free_bytes=place.device.memory_bytes - held - kv_bytes - placing.overhead_bytes(home),
            experts=own if helpers else None,
            helpers=tuple(helpers),
        )

    def _shares(
        self, problem: Problem, home: int, members: int, start: int, end: int
    ) -> list[ExpertIds]:
        """Experts of every host, the home first, by layer; none where the home has them all."""
        if members == 1 << home:
            return []
        placing, cost = self.placing, self.placing.cost(home)
        variant = (start == 0) + 2 * (end == problem.num_layers)
        split = placing.split(home, members, problem.step_tokens)
        counts_KH = split.counts(variant, end - start).tolist()
        seats = placing.seats(home, members)
        rooms = split.spare(variant, end - start)
        rows = []
        for layer, counts in zip(range(start, end), counts_KH, strict=True):
            measured = self._workload.popularity
            popularity = None if measured is None else measured[layer]
            held = choose_experts(
                cost, layer, seats, counts, tokens=problem.step_tokens, popularity=popularity
            )
            rows.append(held if popularity is None else add_copies(held, rooms, seats, popularity))
        return [tuple(tuple(held[host]) for held in rows) for host in range(len(seats))]

    def predicted(self, pipeline: Pipeline) -> Pipeline:
        """`pipeline` with its times, of stages without helpers or those of the best route. Stages
        that share a device take turns there."""
        number_of = {(p.node.host, p.device_name): n for n, p in enumerate(self.places)}
        seats = [
            [(s.host, s.device), *((h.host, h.device) for h in s.helpers)] for s in pipeline.stages
        ]
        if not all(seat in number_of for stage in seats for seat in stage):
            return pipeline
        sites = [number_of[stage[0]] for stage in seats]
        members = [sum(1 << number_of[seat] for seat in stage) for stage in seats]
        ends = [stage.end_layer for stage in pipeline.stages]
        objective = self._workload.objective
        # Only the goal of throughput searches for the size of a step.
        num_steps = len(set(sites))
        if objective == "throughput" and pipeline.num_micro_batches is not None:
            num_steps = pipeline.num_micro_batches
        crowd = self.placing.problem(-(-self._workload.max_concurrency // num_steps))
        alone = self.placing.problem(1)
        places = [[number_of[seat] for seat in stage] for stage in seats]
        together, single = (
            evaluate(each, sites, ends, members, self._popular(pipeline, places, each.step_tokens))
            for each in (crowd, alone)
        )
        shown, trip = (alone, single) if objective == "latency" else (crowd, together)
        stages = []
        for number, stage in enumerate(pipeline.stages):
            after = sites[(number + 1) % len(sites)]
            hops = shown.return_s if number == len(sites) - 1 else shown.hop_s
            stages.append(
                replace(
                    stage,
                    step_s=trip.stages_s[number],
                    hop_s=float(hops[sites[number], after]),
                    helpers=tuple(
                        self._timed(helper, sites[number], number_of, shown.step_tokens)
                        for helper in stage.helpers
                    ),
                )
            )
        prompt = min(PREFILL_TOKENS, self._workload.max_context_tokens)
        prediction = Prediction(
            objective=objective,
            step_tokens=shown.step_tokens,
            round_trip_s=trip.round_trip_s,
            tokens_per_s=together.tokens_per_s(crowd),
            stream_tokens_per_s=1 / single.round_trip_s,
            prefill_s=self.placing.prefill_s(sites, ends, prompt),
            prefill_tokens=prompt,
            assumed=self._assumed(sites, members),
        )
        micro_batches = -(-self._workload.max_concurrency // crowd.step_tokens)
        return replace(
            pipeline,
            stages=tuple(stages),
            prediction=prediction,
            num_micro_batches=micro_batches,
        )

    def _popular(
        self, pipeline: Pipeline, places: Sequence[Sequence[int]], tokens: int
    ) -> list[float] | None:
        """Seconds of every stage under the popularity of experts; None where all are alike."""
        popularity = self._workload.popularity
        if popularity is None:
            return None
        return [
            popular_stage_s(self.placing, stage, there, tokens, popularity)
            for stage, there in zip(pipeline.stages, places, strict=True)
        ]

    def _timed(
        self, helper: ExpertHost, home: int, number_of: dict[tuple[str, str], int], tokens: int
    ) -> ExpertHost:
        placing, cost = self.placing, self.placing.cost(home)
        number = number_of[helper.host, helper.device]
        speed = placing.speed(number, placing.dtypes[home])
        share = 1 - (1 - cost.experts_per_token / cost.num_experts) ** tokens
        read = helper.weights_bytes * share / (speed.read_gbps * 1e9)
        rows = tokens * cost.hidden_bytes
        outputs = rows * cost.experts_per_token
        there, back = placing.link(home, number), placing.link(number, home)
        way_s = hop_s(rows, there) + hop_s(outputs, back) + placing.speed(home).helper_overhead_s
        return replace(helper, step_s=read, hop_s=way_s)

    def unused(self, smallest_bytes: int) -> dict[str, str]:
        """Why each host without a part has none: what the best route with it would do."""
        assert self.found is not None
        problem, now = self.found
        stages = [Stage(*each) for each in zip(now.sites, now.members, strict=True)]
        hosts = {place.node.host for place in self.used()}
        search = Search(problem)
        told: dict[object, str] = {}
        reasons: dict[str, str] = {}
        for number, place in enumerate(self.places):
            host = place.node.host
            if host in hosts or host in reasons:
                continue
            if place.usable_bytes < smallest_bytes:
                reasons[host] = (
                    f"too small: {gigabytes(place.usable_bytes)} usable, one layer takes "
                    f"{gigabytes(smallest_bytes)}"
                )
                continue
            links = tuple(
                (problem.hop_s[number, site], problem.hop_s[site, number]) for site in now.sites
            )
            speed = device_speed(place.device, self.placing.dtypes[number])
            kind = (speed, place.usable_bytes, links)
            if kind not in told:
                told[kind] = (
                    self._with(number, stages, search, now)
                    if len(told) < MAX_EXPLAINED
                    else self._slower(number, now.sites, problem)
                )
            reasons[host] = told[kind]
        return reasons

    def _with(self, number: int, stages: list[Stage], search: Search, now: Route) -> str:
        alone, is_busy = Stage.alone(number), self._workload.objective == "throughput"
        routes = [
            search.best_in_order((*stages[:at], alone, *stages[at:]), throughput=is_busy)
            for at in range(len(stages) + 1)
        ]
        found = [route for route in routes if route is not None]
        if not found:
            return "not needed: no split with one layer or more on it fits"
        if is_busy:
            best = max(route.tokens_per_s(search.problem) for route in found)
            return (
                f"not needed: with it at best {best:.1f} tokens/s in place of "
                f"{now.tokens_per_s(search.problem):.1f}"
            )
        least = min(route.round_trip_s for route in found)
        return (
            f"not needed: with it a token takes {milliseconds(least)} in place of "
            f"{milliseconds(now.round_trip_s)}"
        )

    def _slower(self, number: int, sites: Sequence[int], problem: Problem) -> str:
        def per_layer(site: int) -> float:
            return float(problem.sites[site].seconds_L[-1]) / problem.num_layers

        used = sorted(per_layer(site) for site in sites)
        return (
            f"not needed: a layer takes {milliseconds(per_layer(number))} there, "
            f"{milliseconds(used[0])} to {milliseconds(used[-1])} on the nodes that are used"
        )

    def _assumed(self, sites: list[int], members: list[int]) -> tuple[str, ...]:
        said = [f"half of the context ({self._workload.max_context_tokens // 2} tokens) is in use"]
        if self._workload.objective == "throughput":
            said.append(f"{PROMPT_TOKENS:g} token of prompts comes with every token generated")
        if missing := self.placing.unmeasured(sites, members):
            link = assumed_link("a", "b")
            said.append(
                f"1 GbE ({milliseconds(link.rtt_s)} round trip) where no link was measured: "
                + ", ".join(missing)
            )
        used = [
            self.places[site].node
            for at in zip(sites, members, strict=True)
            for site in _sites(*at)
        ]
        said += [
            f"{node.host} is as fast as it was measured, beside other work on "
            f"{node.busy_share * 100:.0f} % of its processors"
            for node in {node.host: node for node in used}.values()
            if node.was_busy
        ]
        return tuple(said)


def _sites(home: int, members: int) -> tuple[int, ...]:
    return (home, *helpers_of(home, members))
