"""Holds the planner to brute force, to its time, to other planners and to published layouts.

    python benchmarks/planner.py --quick     every case, fewer random clusters: some minutes
    python benchmarks/planner.py             as many as the goals name
    python benchmarks/planner.py --case others --from 1 --count 20 --output FILE     a part, added
    python benchmarks/planner.py --summarise FILE --output FILE     what such parts come to

Prints one JSON object a case: {"case", "ours", "reference", "ratio", "goal", "holds"}; tokens per
second come from the planner's cost model or from a simulation, not from measurements of a cluster.
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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from magnetar.benchmarks.other_planners import against_other_planners, helix, summary
from magnetar.benchmarks.random_clusters import Cluster
from magnetar.benchmarks.rows import row
from magnetar.cluster.footprint import footprint
from magnetar.cluster.inventory.profiles import profiles
from magnetar.cluster.plan import Device, Inventory, Link, Node, Objective, Workload
from magnetar.cluster.planning.pipelines_plan import PipelinesPlanner
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.cost import (
    assumed_link,
    attention_s,
    device_speed,
    hop_s,
    model_cost,
    output_s,
)
from magnetar.cluster.search.division import best_division
from magnetar.cluster.search.place import MARGIN
from magnetar.cluster.search.problem import Problem, Site
from magnetar.cluster.search.search import busiest, fastest
from magnetar.manifests.inventory import load_inventory
from magnetar.tests.cluster.test_expert_cost import BATCH_1_MS, LINKS
from magnetar.tests.cluster.test_expert_plans import alike, planned
from magnetar.tests.cluster.test_scenarios import SCENARIOS
from magnetar.tests.planning import MIXTRAL, model
from magnetar.tests.shared_experts import (
    cluster_of_pipelines,
    every_plan,
    most_of_divisions,
    small_cluster,
)

CONTEXT_TOKENS = 32768
STREAMS = 8


def against_brute_force(seeds: range) -> Iterator[dict[str, Any]]:
    """Every order, every subset, every cut, and every way to spread the experts of a stage."""
    yield from _one_pipeline(seeds)
    yield from _several_pipelines(seeds)


def _one_pipeline(seeds: range) -> Iterator[dict[str, Any]]:
    sizes = [(3, 8, 1), (4, 6, 1), (5, 6, 1), (2, 8, 3), (3, 4, 3), (3, 3, 4), (4, 3, 2), (5, 3, 2)]
    equal = {"latency": 0, "throughput": 0}
    num_shared = 0
    num_clusters = len(seeds)
    for seed in seeds:
        num_nodes, num_layers, num_experts = sizes[seed % len(sizes)]
        placing = small_cluster(
            seed, num_nodes=num_nodes, num_layers=num_layers, num_experts=max(2, num_experts)
        )
        alone = fastest(placing.problem(1))
        least = min((trip for trip, _ in every_plan(placing, 1)), default=math.inf)
        equal["latency"] += math.isclose(alone.round_trip_s if alone else math.inf, least)
        batches = sorted({-(-STREAMS // count) for count in range(1, num_nodes + 2)})
        most = max(
            (
                min(tokens / bottleneck, STREAMS / trip)
                for tokens in batches
                for trip, bottleneck in every_plan(placing, tokens)
            ),
            default=0.0,
        )
        found = busiest([placing.problem(tokens) for tokens in batches])
        equal["throughput"] += math.isclose(found[1].tokens_per_s(found[0]) if found else 0.0, most)
        if found:
            stages = zip(found[1].sites, found[1].members, strict=True)
            num_shared += any(members != 1 << home for home, members in stages)
    for objective, count in equal.items():
        case = f"optimal as brute force, {objective}, random clusters"
        yield row(case, count, num_clusters, "all of them", count == num_clusters)
    case = "of these, with experts apart from their stage"
    yield row(case, num_shared, num_clusters, "some of them", num_shared > 0)


def _several_pipelines(seeds: range) -> Iterator[dict[str, Any]]:
    """Besides, every partition of the nodes and every way to share the streams out."""
    sizes = [(2, 4, 2), (3, 3, 2), (3, 4, 2), (2, 3, 3), (4, 2, 2), (5, 2, 2)]
    equal = num_several = 0
    for seed in seeds:
        num_nodes, num_layers, num_experts = sizes[seed % len(sizes)]
        placing = cluster_of_pipelines(
            seed,
            num_nodes=num_nodes,
            num_layers=num_layers,
            num_experts=num_experts,
            alike=seed % 4 > 0,
        )
        planner = PipelinesPlanner(placing)
        division = best_division(planner, num_nodes, 3)
        most = most_of_divisions(placing)
        equal += math.isclose(division.score if division else 0.0, most)
        num_several += division is not None and len(division.shares) > 1
    case = "optimal as brute force, throughput of any number of pipelines, random clusters"
    yield row(case, equal, len(seeds), "all of them", equal == len(seeds))
    case = "of these, several pipelines"
    yield row(case, num_several, len(seeds), "some of them", num_several > 0)


def replicas() -> Iterator[dict[str, Any]]:
    """Four cards that each hold the whole model, over 1 GbE, in the closed loop of 16 streams."""
    inventory = load_inventory(SCENARIOS / "four-of-80-gb-over-1-gbe.yaml", environment={})
    several = Cluster(inventory, dtype="int8")
    case = "four nodes that each hold the model, over 1 GbE: pipelines planned"
    yield row(case, len(several.found), 4, "4", len(several.found) == 4)
    ours = several.ours()
    for name, other in (
        ("the best plan of one pipeline", Cluster(inventory, dtype="int8", num_pipelines=1)),
        (
            "four stages of one pipeline",
            Cluster(inventory, dtype="int8", num_pipelines=1, num_stages=4),
        ),
    ):
        their = other.ours()
        yield row(f"simulated tokens/s, to {name}", ours, their, "> 1", ours > their)


def times() -> Iterator[dict[str, Any]]:
    """Whole plans, explanations included, on random nodes with pairwise links."""
    for num_nodes, limit_s, dim in ((8, 1.0, 2048), (8, 1.0, 1024), (64, 10.0, 2048)):
        config, index = model(n_layers=80, dim=dim)
        for objective in ("latency", "throughput"):
            inventory = random_inventory(num_nodes, seed=5)
            workload = Workload(
                max_context_tokens=2048,
                max_concurrency=16,
                objective=_objective(objective),
                separate_experts=True,
            )
            began = time.perf_counter()
            plan(config, index, inventory, workload)
            seconds = time.perf_counter() - began
            several = ", any of which holds the model" * (dim == 1024)
            case = f"seconds to plan 80 layers on {num_nodes} nodes{several}, {objective}"
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
    found = busiest([problem])
    assert found is not None
    slowest = found[1].bottleneck_s * 1000
    goal = "the published optimum, 29.07 ms"
    yield row("five Macs, slowest stage, ms", slowest, 29.07, goal, slowest <= 29.075)
    alone = fastest(problem)
    assert alone is not None
    trip = alone.round_trip_s * 1000
    goal = "one stream stays on one node, 113.9 ms"
    yield row("five Macs, one stream, ms", trip, 113.9, goal, trip <= 113.95)


def layers_or_experts() -> Iterator[dict[str, Any]]:
    """Equal nodes share experts exactly where the table of break-even says that it is faster."""
    agree = cells = 0
    for read_gbps, line in BATCH_1_MS.items():
        for wire, cell in zip(LINKS.values(), line.split(), strict=True):
            pipeline_ms, parallel_ms = map(float, cell.split("/"))
            found = planned(alike(8, 19, read_gbps, wire))
            shares = any(stage.helpers for stage in found.stages)
            # A tie of whole milliseconds goes to experts: its break-even is 3784 GB/s.
            agree += shares == (parallel_ms <= pipeline_ms)
            cells += 1
    case = "experts apart where one token is faster so, links x memories"
    yield row(case, agree, cells, "all of them", agree == cells)


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


GROUPS = ("times", "macs", "first", "experts", "replicas", "helix", "others", "brute")
"""Of cases, in the order of a run."""


def cases_of(group: str, *, quick: bool, seeds: range | None) -> Iterator[dict[str, Any]]:
    """The rows of one group."""
    if group == "times":
        yield from times()
    elif group == "macs":
        yield from five_macs()
    elif group == "first":
        yield from first_deployment()
    elif group == "experts":
        yield from layers_or_experts()
    elif group == "replicas":
        yield from replicas()
    elif group == "helix":
        yield from helix(120 if quick else 360)
    elif group == "others":
        clusters = []
        for each in against_other_planners(seeds or range(1, 36 if quick else 231)):
            clusters.append(each)
            yield each
        yield from summary(clusters) if seeds is None else ()
    else:
        yield from against_brute_force(seeds or range(24 if quick else 300))


def main() -> None:
    """Runs every case, or some."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer random clusters")
    parser.add_argument("--case", choices=GROUPS, action="append", help="only this group of cases")
    parser.add_argument("--from", type=int, dest="first", metavar="N", help="first random cluster")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="clusters from there on")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    parser.add_argument(
        "--summarise", type=Path, metavar="FILE", help="only sum up the clusters kept in a file"
    )
    args = parser.parse_args()
    if args.summarise is not None:
        kept = [json.loads(line) for line in args.summarise.read_text("utf-8").splitlines()]
        rows = summary([each for each in kept if "others_planned" in each])
    else:
        seeds = None if args.first is None else range(args.first, args.first + args.count)
        chosen = (cases_of(group, quick=args.quick, seeds=seeds) for group in args.case or GROUPS)
        rows = itertools.chain([machine() | {"quick": args.quick}], *chosen)
    # Row by row, so that a run that is stopped keeps what it found; runs add to what there is.
    keep = args.output.open("a", encoding="utf-8") if args.output else None
    for case in rows:
        print(json.dumps(case), flush=True)
        if keep is not None:
            print(json.dumps(case), file=keep, flush=True)


if __name__ == "__main__":
    main()
