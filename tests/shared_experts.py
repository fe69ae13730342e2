"""Small clusters whose stages may share experts, and every plan for them: an oracle."""

import math
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, combinations_with_replacement, permutations, product
from typing import Any

import numpy as np

from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import Objective, Workload
from magnetar.cluster.search.cost import attention_s
from magnetar.cluster.search.expert_cost import Array, Seat, hosts_s
from magnetar.cluster.search.place import places_of
from magnetar.cluster.search.placing import Placing
from magnetar.cluster.search.problem import Problem
from magnetar.cluster.search.weighed import WeighedModel
from magnetar.tests.planning import model

Stages = tuple[tuple[int, tuple[int, ...], int], ...]
"""Home, helpers and end layer of each."""


def cluster_of_pipelines(
    seed: int, *, num_nodes: int, num_layers: int, num_experts: int, streams: int = 3, alike: bool
) -> Placing:
    """A `small_cluster` with room for the whole model on some nodes, planned for throughput."""
    return small_cluster(
        seed,
        num_nodes=num_nodes,
        num_layers=num_layers,
        num_experts=num_experts,
        streams=streams,
        memory=(0.5, 2.5),
        objective="throughput",
        alike=alike,
    )


def small_cluster(
    seed: int,
    *,
    num_nodes: int,
    num_layers: int,
    num_experts: int,
    streams: int = 8,
    memory: tuple[float, float] = (0.1, 0.9),
    objective: Objective = "latency",
    alike: bool = False,
) -> Placing:
    """Nodes of very different speed and memory behind links that bind.

    `memory` is the least and the most share of the model's layers that a node may hold. With
    `alike` nodes are nearly equally fast and far from each other: several pipelines often pay.
    """
    draw = random.Random(seed)
    config, index = model(n_layers=num_layers, dim=1024, num_experts=num_experts)
    layer_gb = num_experts * 0.022
    nodes = tuple(
        Node(
            host=f"n{number}",
            address="",
            num_cpus=1,
            devices=(
                Device(
                    kind="cpu",
                    # What a stage takes besides its layers, and some of these.
                    memory_bytes=int(0.75e9 + draw.uniform(*memory) * num_layers * layer_gb * 1e9),
                    read_gbps=draw.choice([20] if alike else [5, 20, 60, 200])
                    * draw.uniform(0.8, 1.2),
                    gemm_gflops=draw.uniform(150, 250) if alike else draw.uniform(200, 20000),
                ),
            ),
        )
        for number in range(num_nodes)
    )
    links = tuple(
        Link(
            source=a.host,
            target=b.host,
            rtt_s=10 ** (draw.uniform(-5, -2.5) + 2 * alike),
            gbps=10 ** draw.uniform(-2, 0.5),
            overhead_s=1e-5,
        )
        for a, b in permutations(nodes, 2)
    )
    inventory = Inventory(nodes=nodes, links=links)
    workload = Workload(
        max_context_tokens=64,
        max_concurrency=streams,
        objective=objective,
        separate_experts=True,
    )
    places = places_of(inventory)
    kv_bytes = streams * 64 * 1024
    return Placing(
        WeighedModel(config, index),
        inventory,
        workload,
        places,
        ["bf16"] * num_nodes,
        kv_bytes=kv_bytes,
    )


def every_plan(placing: Placing, tokens: int) -> Iterator[tuple[float, float]]:
    """Round trip and bottleneck of every plan that fits: all orders, cuts, helpers and spreads.

    A stage's experts are spread in every way over its members; layers and experts are alike, so
    that a way is how many layers have how many experts on which member.
    """
    problem = placing.problem(tokens)
    stage_s = _stage_of(placing, problem, tokens)
    count, num_layers = len(problem.sites), problem.num_layers
    seconds_HMUV = np.full((count, 1 << count, num_layers + 1, num_layers + 1), np.inf)
    for home in range(count):
        for mask in range(1 << count):
            if not mask >> home & 1:
                helpers = tuple(site for site in range(count) if mask >> site & 1)
                for start, end in combinations(range(num_layers + 1), 2):
                    seconds = stage_s(home, helpers, start, end)
                    seconds_HMUV[home, mask, start, end] = np.inf if seconds is None else seconds
    for homes_PS, helpers_PS, ends_PS in _shapes(count, num_layers):
        starts_PS = np.concatenate([np.zeros_like(ends_PS[:, :1]), ends_PS[:, :-1]], axis=1)
        seconds_PS = seconds_HMUV[homes_PS, helpers_PS, starts_PS, ends_PS]
        links = homes_PS[:, :-1], homes_PS[:, 1:]
        trip_P = seconds_PS.sum(axis=1) + problem.hop_s[links].sum(axis=1)
        trip_P += problem.return_s[homes_PS[:, -1], homes_PS[:, 0]]
        slowest_P = np.concatenate([seconds_PS, problem.transfer_s[links]], axis=1).max(axis=1)
        fits_P = np.isfinite(trip_P)
        yield from zip(trip_P[fits_P].tolist(), slowest_P[fits_P].tolist(), strict=True)


@cache
def _shapes(count: int, num_layers: int) -> list[tuple[Array, Array, Array]]:
    """By number of stages: homes, helpers as a bit mask and end layers, [plans, stages] each."""
    found = []
    for stages in range(1, min(count, num_layers) + 1):
        rows = []
        cuts = list(combinations(range(1, num_layers), stages - 1))
        for homes in permutations(range(count), stages):
            others = [site for site in range(count) if site not in homes]
            for helped in product(range(stages + 1), repeat=len(others)):
                helpers = [0] * (stages + 1)
                for other, at in zip(others, helped, strict=True):
                    helpers[at] |= 1 << other
                rows += [(homes, helpers[:stages], (*inner, num_layers)) for inner in cuts]
        homes_PS, helpers_PS, ends_PS = (np.array(each) for each in zip(*rows, strict=True))
        found.append((homes_PS, helpers_PS, ends_PS))
    return found


@cache
def _choices(num_options: int, layers: int) -> Array:
    """[ways, layers]: an option for every layer, in ascending order."""
    return np.array(list(combinations_with_replacement(range(num_options), layers)))


def most_of_divisions(placing: Placing) -> float:
    """Tokens per second of the best of all plans with any number of pipelines: every partition of
    the devices, every way to share the streams out, and every plan for each."""
    streams = placing.workload.max_concurrency

    @cache
    def most(sites: tuple[int, ...], count: int) -> float:
        part = placing.part(sites, count)
        steps = {-(-count // parts) for parts in range(1, min(len(sites) + 1, count) + 1)}
        return max(
            (
                min(tokens / bottleneck, count / trip)
                for tokens in steps
                for trip, bottleneck in every_plan(part, tokens)
            ),
            default=-math.inf,
        )

    found = 0.0
    for groups in _set_partitions(list(range(len(placing.places)))):
        for counts in product(range(1, streams + 1), repeat=len(groups)):
            if sum(counts) == streams:
                shares = zip(groups, counts, strict=True)
                found = max(found, sum(most(tuple(group), count) for group, count in shares))
    return found


def _set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for others in _set_partitions(items[1:]):
        yield [[items[0]], *others]
        for at, group in enumerate(others):
            yield [*others[:at], [items[0], *group], *others[at + 1 :]]


def _stage_of(
    placing: Placing, problem: Problem, tokens: int
) -> Callable[[int, tuple[int, ...], int, int], float | None]:
    cost = placing.cost(0)
    expert, mixes = cost.expert_bytes[0], placing.mixes(tokens)

    def least(cost_of: Callable[[int], Any]) -> Any:
        """Of the steps of a mix on average, in the best mix."""
        return np.min([sum(share * cost_of(n) for share, n in each) for each in mixes], axis=0)

    @cache
    def spreads_of(home: int, helpers: tuple[int, ...]) -> tuple[Array, Array]:
        """[O, H] counts of experts by member, for every way to spread a layer; [O] its seconds."""
        seats = [Seat(speed=placing.speed(home))] + [
            Seat(speed=placing.speed(other), link=placing.link(home, other)) for other in helpers
        ]
        options = [
            counts
            for counts in product(range(cost.num_experts + 1), repeat=len(seats))
            if sum(counts) == cost.num_experts
        ]
        held = np.zeros((len(options), len(seats), cost.num_experts), dtype=np.int64)
        for option, counts in enumerate(options):
            expert_of = iter(range(cost.num_experts))
            for host, number in enumerate(counts):
                for _ in range(number):
                    held[option, host, next(expert_of)] = 1
        return np.array(options), least(lambda n: hosts_s(cost, 0, seats, held, tokens=n))

    def stage_s(home: int, helpers: tuple[int, ...], start: int, end: int) -> float | None:
        site = problem.sites[home]
        is_first, is_last = start == 0, end == problem.num_layers
        layers = end - start
        options, times = spreads_of(home, helpers)
        used = site.needs_L[layers] - layers * cost.num_experts * expert
        used += is_first * site.first_bytes + is_last * site.last_bytes
        rooms = np.array(
            [site.capacity - used]
            + [
                placing.places[other].usable_bytes - placing.helper_overhead_bytes(home)
                for other in helpers
            ]
        )
        chosen = _choices(len(options), layers)
        fits = ((options * expert)[chosen].sum(axis=1) <= rooms).all(axis=1)
        best = times[chosen[fits]].sum(axis=1).min() if fits.any() else None
        if best is None:
            return None
        if not helpers:
            best = site.seconds_L[end] - site.seconds_L[start]
        else:
            speed = placing.speed(home)
            best += layers * least(
                lambda n: attention_s(
                    cost,
                    0,
                    speed,
                    tokens=tokens,
                    context_tokens=32,
                    prompt_tokens=n - tokens,
                    prompt_context_tokens=32 / 3,
                )
            )
        return float(best + is_first * site.first_s + is_last * site.last_s)

    return stage_s
