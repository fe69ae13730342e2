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
import contextlib
import datetime
import itertools
import json
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

from magnetar.benchmarks.brute_force import against_brute_force
from magnetar.benchmarks.other_planners import HELD_OUT, against_other_planners, helix, summary
from magnetar.benchmarks.published_plans import first_deployment, five_macs, layers_or_experts
from magnetar.benchmarks.random_clusters import Cluster, profile_inventory
from magnetar.benchmarks.rows import row
from magnetar.cluster.machines import ComputeDtype, Device, Inventory, Link, Node
from magnetar.cluster.plan import NodeWish, Objective, Workload
from magnetar.cluster.planning.planner import plan
from magnetar.errors import InfeasiblePlanError
from magnetar.manifests.inventory import load_inventory
from magnetar.tests.cluster.test_scenarios import SCENARIOS
from magnetar.tests.planning import MIXTRAL, model


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
    yield from _slowest_of_named_machines()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    yield row("peak memory of all this, MB", peak, 500, "<= 500 MB", peak <= 500)


def _slowest_of_named_machines() -> Iterator[dict[str, Any]]:
    """Mixtral on random clusters of 3 to 8 named machines that may share experts and be divided
    among pipelines: the slowest of many plans, in seconds of one core."""
    wishes = Workload(
        max_context_tokens=2048,
        max_concurrency=16,
        objective="throughput",
        separate_experts=True,
    )
    kinds: tuple[tuple[str, ComputeDtype | None, bool], ...] = (
        ("in bf16", "bf16", False),
        ("in any dtype", None, False),
        ("in bf16, four layers pinned", "bf16", True),
    )
    for name, dtype, has_pin in kinds:
        seconds = []
        for seed in range(1, 31):
            inventory = profile_inventory(seed)
            largest = max(inventory.nodes, key=lambda node: node.devices[0].memory_bytes)
            pins = (NodeWish(host=largest.host, layers=(0, 4)),) if has_pin else ()
            began = time.process_time()
            # To tell what would be enough where nothing fits takes a score of plans, and longer.
            with contextlib.suppress(InfeasiblePlanError):
                plan(*MIXTRAL, inventory, replace(wishes, dtype=dtype, nodes=pins))
                seconds.append(time.process_time() - began)
        case = f"seconds to plan Mixtral {name}, slowest of {len(seconds)} random clusters"
        yield row(case, max(seconds), 1.0, "<= 1 s", max(seconds) <= 1.0)


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
        held_out = range(HELD_OUT, HELD_OUT + (12 if quick else 100))
        known = range(1, 36 if quick else 231)
        parts = [known, held_out] if seeds is None else [seeds]
        for each in itertools.chain.from_iterable(map(against_other_planners, parts)):
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
