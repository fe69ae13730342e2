"""The planner against every plan there is, on random clusters so small that all can be tried."""

import math
from collections.abc import Iterator
from typing import Any

from magnetar.benchmarks.rows import row
from magnetar.cluster.planning.pipelines_plan import PipelinesPlanner
from magnetar.cluster.search.contest import busiest
from magnetar.cluster.search.division import best_division
from magnetar.cluster.search.search import Search
from magnetar.tests.shared_experts import (
    cluster_of_pipelines,
    every_plan,
    most_of_divisions,
    small_cluster,
)

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
        alone = Search(placing.problem(1)).fastest()
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
