"""Random clusters of named machines, and what a layout on one yields in a closed loop."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

from magnetar.benchmarks.closed_loop import Load, Server, Steps, steps_tokens_per_s
from magnetar.benchmarks.layouts import Chain, by_speed, exo_ring, parallax, petals, uniform
from magnetar.cluster.footprint import STEP_TOKENS, footprint
from magnetar.cluster.inventory.profiles import profiles
from magnetar.cluster.machines import ComputeDtype, Inventory, Link, Node
from magnetar.cluster.plan import Workload
from magnetar.cluster.planning.pipelines_plan import PipelinesPlanner
from magnetar.cluster.search.cost import (
    decode_scores_s,
    experts_s,
    hop_s,
    output_s,
    prompt_scores_s,
    shared_s,
)
from magnetar.cluster.search.expert_cost import hosts_s
from magnetar.cluster.search.expert_split import in_turn
from magnetar.cluster.search.place import places_of
from magnetar.cluster.search.placing import Placing
from magnetar.cluster.search.problem import Problem, Route, evaluate
from magnetar.cluster.search.weighed import WeighedModel
from magnetar.tests.planning import MIXTRAL

LINKS = {"Wi-Fi": (4.0, 0.03), "1 GbE": (0.3, 0.117), "10 GbE": (0.1, 1.17)}
"""Round trip in milliseconds and gigabytes per second."""
CONTEXT_TOKENS, STREAMS = 2048, 16
LOAD = Load(prompts=(64, 128, 256, 512), outputs=(384, 128, 256, 512), streams=STREAMS)
Layout = Callable[[Placing], list[Chain]]
BASELINES: Mapping[str, Layout] = {
    "memory ring": exo_ring,
    "block choice": petals,
    "water-filling": parallax,
    "uniform": uniform,
}
KINDER: Mapping[str, Layout] = {**BASELINES, "by our speeds": by_speed}
"""With what the third would do if it knew how fast we take nodes to be, and used all of them."""
_SIZES = (STEP_TOKENS, STEP_TOKENS // 4, STEP_TOKENS // 8, STEP_TOKENS // 16)
"""Of steps, that others may choose from where they may."""
_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 600)


def profile_inventory(seed: int) -> Inventory:
    """3 to 8 machines of named profiles; the slower network of a pair decides its link."""
    draw = random.Random(seed)
    names = sorted(profiles())
    nodes, networks = [], {}
    for number in range(draw.randint(3, 8)):
        name = draw.choice(names)
        host = f"{number}-{name}"
        networks[host] = LINKS[draw.choice(sorted(LINKS))]
        device = profiles()[name].device
        nodes.append(Node(host=host, address="", num_cpus=8, devices=(device,)))
    links = []
    for a, b in itertools.permutations(networks, 2):
        rtt_ms, gbps = max(networks[a], networks[b])
        links.append(Link(source=a, target=b, rtt_s=rtt_ms / 1000, gbps=gbps))
    return Inventory(nodes=tuple(nodes), links=tuple(links))


class Cluster:
    """Mixtral on some machines, for 16 streams of 2048 tokens."""

    def __init__(
        self,
        inventory: Inventory,
        *,
        dtype: ComputeDtype = "bf16",
        num_pipelines: int | None = None,
        num_stages: int | None = None,
    ) -> None:
        config, index = MIXTRAL
        workload = Workload(
            max_context_tokens=CONTEXT_TOKENS,
            max_concurrency=STREAMS,
            objective="throughput",
            separate_experts=True,
            num_pipelines=num_pipelines,
            num_stages=num_stages,
        )
        places = places_of(inventory)
        kv_bytes = STREAMS * CONTEXT_TOKENS * footprint(config, index, dtype).kv_bytes_per_token
        self.placing = Placing(
            WeighedModel(config, index),
            inventory,
            workload,
            places,
            [dtype] * len(places),
            kv_bytes=kv_bytes,
        )
        self.found = PipelinesPlanner(self.placing).found
        """A planner for each pipeline; none: nothing fits."""

    def ours(self) -> float:
        """Tokens per second of our plan, with its own number of micro-batches and size of steps."""
        total = 0.0
        for planner in self.found:
            assert planner.found is not None
            search, route = planner.found
            problem = search.problem
            steps = -(-planner.streams // problem.step_tokens)
            part = planner.placing
            size = planner.size
            total += _simulated(part, problem, route, steps, planner.streams, size)
        return total

    def baselines(
        self,
        layouts: Mapping[str, Layout] = BASELINES,
        *,
        most_copies: int = 1,
        any_batches: bool = False,
    ) -> dict[str, float]:
        """Of those layouts that fit; one micro-batch a stage, as is the default, or with
        `any_batches` as many, and steps as large, as are best for each. With `most_copies` above 1
        each has as many copies of its layout, on nodes dealt out by memory, as are best for it,
        though only two think of copies by themselves."""
        found = {}
        for name, layout in layouts.items():
            rates = [
                self._chains(chains, any_batches=any_batches)
                for copies in range(1, most_copies + 1)
                if (chains := self._copies(layout, copies))
            ]
            if rates:
                found[name] = max(rates)
        return found

    def _copies(self, layout: Layout, copies: int) -> list[Chain]:
        """The chains of each of so many groups of nodes; none where one does not fit."""
        places = self.placing.places
        groups: list[list[int]] = [[] for _ in range(copies)]
        for number in sorted(range(len(places)), key=lambda n: -places[n].usable_bytes):
            light = min(groups, key=lambda group: sum(places[n].usable_bytes for n in group))
            light.append(number)
        found = []
        for group in groups:
            own = sorted(group)
            chains = layout(self.placing.part(own, -(-STREAMS // copies)))
            if not chains:
                return []
            found += [(tuple(own[site] for site in sites), ends) for sites, ends in chains]
        return found

    def _chains(
        self, chains: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], *, any_batches: bool
    ) -> float:
        """Chains beside each other share the streams by how fast each goes around."""
        problem = self.placing.problem(1)
        routes = [evaluate(problem, sites, ends) for sites, ends in chains]
        rates = [1 / route.round_trip_s for route in routes]
        total = 0.0
        for route, rate in zip(routes, rates, strict=True):
            streams = round(STREAMS * rate / sum(rates))
            if not streams:
                continue
            stages = len(route.sites)
            policies = [(stages, STEP_TOKENS)]
            if any_batches:
                counts = range(1, min(stages, streams) + 1)
                policies = list(itertools.product(counts, _SIZES))
            total += max(
                _simulated(self.placing, problem, route, count, streams, size)
                for count, size in policies
            )
        return total


def _simulated(
    placing: Placing,
    problem: Problem,
    route: Route,
    micro: int,
    streams: int,
    step_tokens: int = STEP_TOKENS,
) -> float:
    spans = zip(route.sites, route.members, route.starts, route.ends, strict=True)
    servers = [_server(placing, problem, *span) for span in spans]
    links = [
        placing.link(a, b)
        for a, b in zip(route.sites, (*route.sites[1:], route.sites[0]), strict=True)
    ]
    hidden = placing.cost(0).hidden_bytes
    around_s = [placing.places[site].device.step_overhead_s for site in route.sites]

    def hops_s(at: int, tokens: int) -> float:
        away = tokens * (256 if at == len(links) - 1 else hidden)
        return around_s[at] + hop_s(away, links[at])

    load = Load(prompts=LOAD.prompts, outputs=LOAD.outputs, streams=streams)
    policy = Steps(micro_batches=micro, step_tokens=step_tokens)
    return steps_tokens_per_s(servers, hops_s, load, policy, num_steps=1200 * micro)


def _server(
    placing: Placing, problem: Problem, home: int, members: int, start: int, end: int
) -> Server:
    cost, speed = placing.cost(home), placing.speed(home)
    layers = end - start
    times = []
    if members == 1 << home:
        times = [layers * experts_s(cost, start, speed, tokens=n) for n in _GRID]
    else:
        variant = (start == 0) + 2 * (end == problem.num_layers)
        split = placing.split(home, members, problem.step_tokens)
        counts, repeats = np.unique(split.counts(variant, layers), axis=0, return_counts=True)
        held, seats = in_turn(counts, cost.num_experts), placing.seats(home, members)
        times = [float(hosts_s(cost, start, seats, held, tokens=n) @ repeats) for n in _GRID]
    for at, n in enumerate(_GRID):
        times[at] += layers * shared_s(cost, start, speed, tokens=n)
    decoded_s = layers * decode_scores_s(cost, speed, tokens=1, context_tokens=CONTEXT_TOKENS // 4)
    prompt_context = CONTEXT_TOKENS // 8
    is_last = end == problem.num_layers

    @cache
    def step_s(decodes: int, prompt: int) -> float:
        seconds = float(np.interp(decodes + prompt, _GRID, times))
        seconds += decodes * decoded_s
        if prompt:
            seconds += layers * prompt_scores_s(
                cost, speed, tokens=prompt, context_tokens=prompt_context
            )
        return seconds + is_last * output_s(cost, speed, tokens=max(1, decodes))

    return Server(step_s=step_s, kv_tokens=float("inf"))
