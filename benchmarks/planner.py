"""Holds the planner to brute force, to its time, to other planners and to published layouts.

    python benchmarks/planner.py --quick     every case, fewer random clusters: some minutes
    python benchmarks/planner.py             as many as the goals name

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

from magnetar.benchmarks.closed_loop import Waiting
from magnetar.benchmarks.helix import HelixCluster, Layout
from magnetar.benchmarks.random_clusters import Cluster
from magnetar.cluster.footprint import footprint
from magnetar.cluster.inventory.profiles import profiles
from magnetar.cluster.plan import Device, Inventory, Link, Node, Objective, Workload
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.cost import (
    assumed_link,
    attention_s,
    device_speed,
    hop_s,
    model_cost,
    output_s,
)
from magnetar.cluster.search.place import MARGIN
from magnetar.cluster.search.problem import Problem, Site
from magnetar.cluster.search.search import busiest, fastest
from magnetar.tests.cluster.test_expert_cost import BATCH_1_MS, LINKS
from magnetar.tests.cluster.test_expert_plans import alike, planned
from magnetar.tests.planning import MIXTRAL, model
from magnetar.tests.shared_experts import every_plan, small_cluster

CONTEXT_TOKENS = 32768
STREAMS = 8


def row(case: str, ours: float, reference: float, goal: str, holds: bool) -> dict[str, Any]:
    """One case as it is printed."""
    ratio = ours / reference if reference else 1.0
    return {
        "case": case,
        "ours": float(f"{ours:.5g}"),
        "reference": float(f"{reference:.5g}"),
        "ratio": float(f"{ratio:.4g}"),
        "goal": goal,
        "holds": bool(holds),
    }


def against_brute_force(num_clusters: int) -> Iterator[dict[str, Any]]:
    """Every order, every subset, every cut, and every way to spread the experts of a stage."""
    sizes = [(3, 8, 1), (4, 6, 1), (5, 6, 1), (2, 8, 3), (3, 4, 3), (3, 3, 4), (4, 3, 2), (5, 3, 2)]
    equal = {"latency": 0, "throughput": 0}
    num_shared = 0
    for seed in range(num_clusters):
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


def times() -> Iterator[dict[str, Any]]:
    """Whole plans, explanations included, on random nodes with pairwise links."""
    config, index = model(n_layers=80, dim=2048)
    for num_nodes, limit_s in ((8, 1.0), (64, 10.0)):
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


def helix(seconds: float) -> Iterator[dict[str, Any]]:
    """Helix's clusters: maximum flow, and closed loops under its policy and under chunks."""
    large, small = HelixCluster("helix-single24"), HelixCluster("helix-small10")
    chain = large.chain()
    began = time.perf_counter()
    flow = large.flow(large.chain())[0]
    took = time.perf_counter() - began
    case = "helix-single24, maximum flow of the chain, tokens/s"
    yield row(case, flow, 1289.556, ">= 2045", flow >= 2045)
    yield row("the same, seconds to find it", took, 1.0, "< 1", took < 1)
    layouts, published = large.data["layouts"], large.data["results"]

    def loop(cluster: HelixCluster, layout: Layout, policy: Waiting) -> float:
        return cluster.decode_tokens_per_s(layout, policy, warm_s=240, measured_s=seconds)

    base = loop(large, layouts["helix"], Waiting())
    for name in ("swarm", "exo_ring", "chain", "chain_kv"):
        ours = loop(large, layouts[name], Waiting()) / base
        known = published[name].get("remeasured")
        if known is None:
            known = published[name]["sim_offline"] / published["helix"]["sim_offline"]
        else:
            known /= published["helix"]["remeasured"]
        case = f"simulated decoding of {name} to that of helix, whole prompts in order"
        yield row(case, ours, known, "within 15 %", abs(ours / known - 1) <= 0.15)
    shared = large.in_flight(chain) // sum(bool(span) for span in chain)
    for goal, cap in (("in-flight / stages", shared), ("four times that", 4 * shared)):
        policy = Waiting(chunk_tokens=64, most_decodes=cap)
        ours, theirs = loop(large, chain, policy), loop(large, layouts["helix"], policy)
        case = f"helix-single24, decode tokens/s, chunks of 64, at most {goal} a step"
        yield row(case, ours, theirs, ">= 1.3", ours >= 1.3 * theirs)
    chain = small.chain()
    flow = small.flow(chain)[0]
    yield row("helix-small10, maximum flow", flow, 286.587, ">= 286.6 rounded", flow >= 286.55)
    cap = max(1, small.in_flight(chain) // 10)
    policy = Waiting(chunk_tokens=64, most_decodes=cap)
    ours, theirs = loop(small, chain, policy), loop(small, small.data["layouts"]["helix"], policy)
    yield row("helix-small10, decode tokens/s", ours, theirs, ">= 1", ours >= theirs)


def against_other_planners(num_clusters: int) -> Iterator[dict[str, Any]]:
    """exo's memory ring, Petals' block choice, Parallax' water-filling and an even split.

    A cluster is 3 to 8 machines of the named profiles, each behind a network of its own kind; the
    model is Mixtral in bf16. All layouts run in the same closed loop of 16 streams, the others'
    with a micro-batch a stage, which is the default, and on every fourth cluster again with as many
    as are best for each.
    """
    ratios: list[float] = []
    kind: list[float] = []
    seed = num_unplanned = 0
    while len(ratios) < num_clusters:
        seed += 1
        cluster = Cluster(seed)
        baselines = cluster.baselines()
        if cluster.found is None:
            num_unplanned += bool(baselines)
            continue
        if baselines:
            ours = cluster.ours()
            ratios.append(ours / max(baselines.values()))
            if len(ratios) % 4 == 0:
                kind.append(ours / max(cluster.baselines(any_batches=True).values()))
    yield row("clusters where only others fit", num_unplanned, 0, "none", num_unplanned == 0)
    for name, found in (("", ratios), (", each with its best micro-batches", kind)):
        mean = math.exp(sum(math.log(ratio) for ratio in found) / len(found))
        case = f"against the best of four planners{name}, geometric mean, {len(found)} clusters"
        yield row(case, mean, 1.0, ">= 1.3", mean >= 1.3)
        yield row("the same, worst cluster", min(found), 1.0, ">= 0.99", min(found) >= 0.99)


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
        layers_or_experts(),
        helix(120 if args.quick else 360),
        against_other_planners(30 if args.quick else 200),
        against_brute_force(24 if args.quick else 300),
    )
    # Row by row, so that a run that is stopped keeps what it found.
    keep = args.output.open("w", encoding="utf-8") if args.output else None
    for case in itertools.chain(rows, cases):
        print(json.dumps(case), flush=True)
        if keep is not None:
            print(json.dumps(case), file=keep, flush=True)


if __name__ == "__main__":
    main()
