"""Holds the planner to brute force, to its time, to other planners and to a published layout.

    python benchmarks/planner.py --quick     every case, fewer random clusters: half a minute
    python benchmarks/planner.py             as many as the goals name

Prints one JSON object a case: {"case", "ours", "reference", "ratio", "goal", "holds"}; scores are
tokens per second or seconds under the planner's own cost model, not measurements of a cluster.
With ``--output FILE`` they are kept after a first object that describes the machine.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import random
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from magnetar.cluster.cost import (
    assumed_link,
    attention_s,
    device_speed,
    hop_s,
    model_cost,
    output_s,
)
from magnetar.cluster.footprint import footprint
from magnetar.cluster.place import MARGIN
from magnetar.cluster.plan import Device, Inventory, Link, Node, Objective, Workload
from magnetar.cluster.planner import plan
from magnetar.cluster.profiles import profiles
from magnetar.cluster.search import Problem, Route, Site, busiest, evaluate, fastest
from magnetar.cluster.speed_plan import SpeedPlanner
from magnetar.tests.planning import MIXTRAL, every_route, fits, model, random_problem

CONTEXT_TOKENS = 32768
STREAMS = 8


def row(case: str, ours: float, reference: float, goal: str, holds: bool) -> dict[str, Any]:
    """One case as it is printed."""
    ratio = ours / reference if reference else math.nan
    return {
        "case": case,
        "ours": float(f"{ours:.5g}"),
        "reference": float(f"{reference:.5g}"),
        "ratio": float(f"{ratio:.4g}"),
        "goal": goal,
        "holds": bool(holds),
    }


def problem_for(seed: int, num_sites: int, num_layers: int) -> Callable[[int], Problem]:
    """The problem of a number of stages, with the scheduler's batch for it."""

    def of(count: int) -> Problem:
        tokens = -(-STREAMS // (count + 1))
        return random_problem(seed, num_sites=num_sites, num_layers=num_layers, step_tokens=tokens)

    return of


def against_brute_force(num_clusters: int) -> Iterator[dict[str, Any]]:
    """Every order, every subset, every cut."""
    draw = random.Random(1)
    equal = {"latency": 0, "throughput": 0}
    for seed in range(num_clusters):
        # Most are small: the largest take brute force a second each.
        num_sites, num_layers = draw.choice([(3, 8), (4, 6), (4, 8), (5, 5), (5, 6), (5, 8)])
        of = problem_for(seed, num_sites, num_layers)
        alone = of(num_sites)
        best = min((route.round_trip_s for route in every_route(alone)), default=math.inf)
        route = fastest(alone)
        equal["latency"] += math.isclose(route.round_trip_s if route else math.inf, best)
        most = 0.0
        for count in range(1, num_sites + 1):
            problem = of(count)
            for each in every_route(problem, num_stages=count):
                most = max(most, each.tokens_per_s(problem))
        found = busiest(of, num_sites=num_sites)
        equal["throughput"] += math.isclose(found[1].tokens_per_s(found[0]) if found else 0.0, most)
    for objective, count in equal.items():
        case = f"optimal as brute force, {objective}, random clusters"
        yield row(case, count, num_clusters, "all of them", count == num_clusters)


def times() -> Iterator[dict[str, Any]]:
    """Whole plans, explanations included, on random nodes with pairwise links."""
    config, index = model(n_layers=80, dim=2048)
    for num_nodes, limit_s in ((8, 1.0), (64, 10.0)):
        for objective in ("latency", "throughput"):
            inventory = random_inventory(num_nodes, seed=5)
            workload = Workload(
                max_context_tokens=2048, max_concurrency=16, objective=_objective(objective)
            )
            began = time.perf_counter()
            plan(config, index, inventory, workload)
            seconds = time.perf_counter() - began
            case = f"seconds to plan 80 layers on {num_nodes} nodes, {objective}"
            yield row(case, seconds, limit_s, f"<= {limit_s:g} s", seconds <= limit_s)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    yield row("peak memory of all this, MB", peak, 500, "<= 500 MB", peak <= 500)


def _objective(name: str) -> Objective:
    return "latency" if name == "latency" else "throughput"


def random_inventory(num_nodes: int, *, seed: int) -> Inventory:
    """Nodes of different speed and memory, all links different."""
    draw = random.Random(seed)
    nodes = tuple(
        Node(
            host=f"n{number:02}",
            address="",
            num_cpus=8,
            devices=(
                Device(
                    kind="cpu",
                    memory_bytes=int(draw.uniform(8, 24) * 1e9),
                    read_gbps=draw.uniform(30, 900),
                    gemm_gflops=draw.uniform(1000, 90_000),
                ),
            ),
        )
        for number in range(num_nodes)
    )
    links = tuple(
        Link(
            source=a.host,
            target=b.host,
            rtt_s=draw.uniform(0.05, 5) / 1000,
            gbps=draw.uniform(0.05, 3),
        )
        for a, b in itertools.permutations(nodes, 2)
    )
    return Inventory(nodes=nodes, links=links)


def five_macs() -> Iterator[dict[str, Any]]:
    """exo issue 957: 40 layers of 1 GB, STREAM triads; min-max optimum and the best single one."""
    speeds = (264.4, 344.0, 308.7, 351.2, 177.6)
    memories = (36, 96, 64, 96, 36)
    nothing = np.zeros((5, 5))
    problem = Problem(
        sites=tuple(
            Site(
                seconds_L=np.arange(41) / speed,
                needs_L=np.arange(41.0),
                capacity=float(memory),
            )
            for speed, memory in zip(speeds, memories, strict=True)
        ),
        hop_s=nothing,
        return_s=nothing,
        transfer_s=nothing,
        step_tokens=1,
        streams=10**9,
    )
    found = busiest(lambda _: problem, num_sites=5)
    assert found is not None
    slowest = found[1].bottleneck_s * 1000
    goal = "the published optimum, 29.07 ms"
    yield row("five Macs, slowest stage, ms", slowest, 29.07, goal, slowest <= 29.075)
    alone = fastest(problem)
    assert alone is not None
    trip = alone.round_trip_s * 1000
    goal = "one stream stays on one node, 113.9 ms"
    yield row("five Macs, one stream, ms", trip, 113.9, goal, trip <= 113.95)


LINKS = {"Wi-Fi": (4.0, 0.03), "1 GbE": (0.3, 0.117), "10 GbE": (0.1, 1.17)}
"""Round trip in milliseconds and gigabytes per second."""


def against_other_planners(num_clusters: int) -> Iterator[dict[str, Any]]:
    """Layers by memory (exo's ring), by speed (water-filling), and evenly, on the same clusters.

    A cluster is 3 to 8 machines of the named profiles, each behind a network of its own kind;
    the model is Mixtral for 16 streams of 2048 tokens. Nobody gets more than fits.
    """
    config, index = MIXTRAL
    weights = footprint(config, index, "bf16")
    workload = Workload(max_context_tokens=2048, max_concurrency=16, objective="throughput")
    kv_bytes = 16 * 2048 * weights.kv_bytes_per_token
    ratios: list[float] = []
    seed = 0
    while len(ratios) < num_clusters:
        seed += 1
        inventory = profile_inventory(seed)
        planner = SpeedPlanner(config, index, inventory, workload, "bf16", kv_bytes=kv_bytes)
        found = busiest(planner.problem, num_sites=len(inventory.nodes))
        if found is None:
            continue
        problem, best = planner.problem(1), 0.0
        for shares in (
            [site.capacity for site in problem.sites],
            [1 / float(site.seconds_L[-1]) for site in problem.sites],
            [1.0] * len(problem.sites),
        ):
            route = _proportional(problem, shares)
            if route is not None:
                actual = planner.problem(len(route.sites))
                scored = evaluate(actual, route.sites, route.ends)
                best = max(best, scored.tokens_per_s(actual))
        if best:
            ratios.append(found[1].tokens_per_s(found[0]) / best)
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    case = f"against the best of three simple planners, geometric mean of {len(ratios)} clusters"
    yield row(case, mean, 1.0, ">= 1.3", mean >= 1.3)
    worst = min(ratios)
    yield row("the same, worst cluster", worst, 1.0, ">= 0.99", worst >= 0.99)


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


def _proportional(problem: Problem, shares: list[float]) -> Route | None:
    """Layers in proportion to shares as far as each site has room, in the order of the sites."""
    num_layers = problem.num_layers
    layer_bytes = float(problem.sites[0].needs_L[-1]) / num_layers
    ends_bytes = problem.sites[0].first_bytes + problem.sites[0].last_bytes
    room = [int((site.capacity - ends_bytes) // layer_bytes) for site in problem.sites]
    counts = [0] * len(shares)
    for _ in range(num_layers):
        free = [i for i in range(len(shares)) if counts[i] < room[i]]
        if not free:
            return None
        counts[max(free, key=lambda i: shares[i] / (counts[i] + 1))] += 1
    sites = tuple(number for number, count in enumerate(counts) if count)
    ends = tuple(itertools.accumulate(counts[number] for number in sites))
    return evaluate(problem, sites, ends) if fits(problem, sites, ends) else None


def first_deployment() -> Iterator[dict[str, Any]]:
    """Mixtral on four cards of 40 GB against the layout it first ran in publicly.

    There every card holds two experts of every layer (24/21/21/21 GiB), the first one also all
    attention and with it all keys and values, and one batch at a time goes through the layers.
    """
    card = replace(profiles()["a100-40"].device, memory_bytes=40 << 30)
    nodes = tuple(
        Node(host="box", address="", num_cpus=64, devices=(replace(card, index=i),))
        for i in range(4)
    )
    box = Inventory(
        nodes=(replace(nodes[0], devices=tuple(n.devices[0] for n in nodes)),),
    )
    workload = Workload(
        max_context_tokens=CONTEXT_TOKENS, max_concurrency=STREAMS, objective="throughput"
    )
    found = plan(*MIXTRAL, box, workload)
    assert found.prediction is not None
    case = "Mixtral bf16 on 4 x 40 GB, streams of 32k tokens"
    yield row(case, found.max_concurrency, STREAMS, ">= 8", found.max_concurrency >= STREAMS)
    ours = found.prediction.tokens_per_s
    one_by_one, together = published_layout(card)
    case = "Mixtral on 4 x 40 GB, tokens/s against the first public layout"
    yield row(f"{case}, its experts in turn", ours, one_by_one, ">= 3", ours >= 3 * one_by_one)
    case += ", all its cards at once (kinder than it was)"
    yield row(case, ours, together, ">= 3", ours >= 3 * together)


def published_layout(card: Device) -> tuple[float, float]:
    """Tokens per second of that layout: with experts in turn, and with cards at once."""
    config, index = MIXTRAL
    weights = footprint(config, index, "bf16")
    cost, speed = model_cost(config, index, "bf16"), device_speed(card, "bf16")
    assert speed is not None
    held = sum(cost.attention_bytes) + 2 * sum(cost.expert_bytes)
    held += weights.embeddings_bytes + weights.output_bytes
    held += weights.workspace_bytes(CONTEXT_TOKENS)
    room = card.memory_bytes * (1 - MARGIN) - held
    streams = int(room // (CONTEXT_TOKENS * weights.kv_bytes_per_token * config.n_layers))
    hop = hop_s(streams * cost.hidden_bytes, assumed_link("box", "box"))
    attention = sum(
        attention_s(cost, layer, speed, tokens=streams, context_tokens=CONTEXT_TOKENS // 2)
        for layer in range(config.n_layers)
    )
    expert_s = cost.expert_bytes[0] / (speed.read_gbps * 1e9)
    in_all, on_one = distinct_experts_of_cards(streams)
    head = output_s(cost, speed, tokens=streams)
    rates = []
    for num_experts in (in_all, on_one):
        step = attention + head + config.n_layers * (num_experts * expert_s + 2 * hop)
        rates.append(streams / step)
    return rates[0], rates[1]


def distinct_experts_of_cards(tokens: int, samples: int = 20_000) -> tuple[float, float]:
    """Expected distinct experts of a step: of all cards, and of the card that has most."""
    draw = random.Random(0)
    in_all = on_one = 0
    for _ in range(samples):
        hit = {expert for _ in range(tokens) for expert in draw.sample(range(8), 2)}
        in_all += len(hit)
        on_one += max(sum(expert // 2 == card for expert in hit) for card in range(4))
    return in_all / samples, on_one / samples


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def main() -> None:
    """Runs every case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer random clusters")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    args = parser.parse_args()
    rows = [machine() | {"quick": args.quick}]
    cases = itertools.chain(
        times(),
        five_macs(),
        first_deployment(),
        against_other_planners(60 if args.quick else 200),
        against_brute_force(60 if args.quick else 300),
    )
    for case in cases:
        print(json.dumps(case), flush=True)
        rows.append(case)
    if args.output:
        text = "\n".join(json.dumps(each) for each in rows)
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
