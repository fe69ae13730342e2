"""Bounds for sets of devices: no stage is quicker, and no plan of all is better."""

from itertools import permutations

import numpy as np
import pytest

from magnetar.cluster.plan import Objective
from magnetar.cluster.search.ceiling import Ceiling, numbers
from magnetar.cluster.search.contest import busiest, contenders
from magnetar.cluster.search.division import Share
from magnetar.cluster.search.placing import Placing
from magnetar.cluster.search.search import Search
from magnetar.cluster.search.set_bounds import Outlook, subsets_of
from magnetar.cluster.search.stage_floor import stage_floors
from magnetar.cluster.search.stage_times import Stage
from magnetar.tests.shared_experts import (
    cluster_of_pipelines,
    every_plan,
    most_of_divisions,
    small_cluster,
)

SIZES = [(2, 6, 4), (3, 4, 3), (4, 3, 2), (3, 3, 8)]


def cluster(seed: int, objective: Objective, *, streams: int = 8) -> Placing:
    num_nodes, num_layers, num_experts = SIZES[seed % len(SIZES)]
    return small_cluster(
        seed,
        num_nodes=num_nodes,
        num_layers=num_layers,
        num_experts=num_experts,
        streams=streams,
        objective=objective,
        alike=seed % 3 == 0,
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_no_stage_is_quicker_than_its_floor(seed: int, tokens: int) -> None:
    placing = cluster(seed, "throughput" if seed % 2 else "latency")
    problem, floors = placing.problem(tokens), stage_floors(placing, tokens)
    for home in range(len(problem.sites)):
        for members in range(1 << len(problem.sites)):
            if not members >> home & 1:
                assert not np.isfinite(floors[home, members]).any()
                continue
            stage_LL = problem.stage_LL(home, members)
            for count in range(1, problem.num_layers + 1):
                quickest = np.diagonal(stage_LL, count).min()
                assert floors[home, members, count] <= quickest * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_no_pipeline_on_any_devices_beats_the_bound_of_these(seed: int) -> None:
    num_nodes, num_layers, num_experts = [(3, 3, 2), (2, 4, 2), (3, 4, 2)][seed % 3]
    placing = cluster_of_pipelines(
        seed,
        num_nodes=num_nodes,
        num_layers=num_layers,
        num_experts=num_experts,
        streams=4,
        alike=seed % 2 == 0,
    )
    ceiling = Ceiling(placing)
    for sites in range(1, 1 << num_nodes):
        for streams in (1, 3, 4):
            numbers = [n for n in range(num_nodes) if sites >> n & 1]
            part = placing.part(numbers, streams)
            steps = {-(-streams // n) for n in range(1, min(len(numbers) + 1, streams) + 1)}
            rates = [
                min(tokens / slowest, streams / trip)
                for tokens in steps
                for trip, slowest in every_plan(part, tokens)
            ]
            most = max(rates, default=0.0)
            assert ceiling.most(Share(sites, streams)) >= most * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_several_pipelines_are_bounded_near_to_what_all_plans_have(seed: int) -> None:
    placing = cluster_of_pipelines(
        seed, num_nodes=3, num_layers=3, num_experts=2, streams=4, alike=True
    )
    ceiling = Ceiling(placing)
    most = most_of_divisions(placing)
    bound = max(ceiling.most_in_all(), ceiling.most(Share(0b111, 4)))
    assert most * (1 - 1e-9) <= bound <= 1.5 * most


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_stages_of_the_best_pipeline_are_hopeful(seed: int, objective: Objective) -> None:
    placing = cluster(seed, objective)
    tokens = 4 if objective == "throughput" else 1
    problem, outlook = placing.problem(tokens), Outlook(placing, tokens)
    if objective == "throughput":
        found = busiest([problem])
        route = found[1] if found else None
        score = route.tokens_per_s(problem) if route else 0.0
    else:
        route = Search(problem).fastest()
        score = 1 / route.round_trip_s if route else 0.0
    assert outlook.most >= score * (1 - 1e-9)
    if route is not None:
        assert {*zip(route.sites, route.members, strict=True)} <= outlook.hopeful(score)
        # What is left out because of the outlook is no better.
        if objective == "throughput":
            (again,) = contenders([Search(problem, outlook)])
            assert again[1].tokens_per_s(problem) == pytest.approx(score)
        else:
            same = Search(problem, outlook).fastest()
            assert same is not None
            assert same.round_trip_s == pytest.approx(route.round_trip_s)


def test_subsets_of_a_set_are_all_of_them() -> None:
    assert sorted(subsets_of(0b1011).tolist()) == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("seed", range(4))
def test_stages_that_a_bound_consists_of_are_disjoint_and_near_the_best(seed: int) -> None:
    placing = small_cluster(seed, num_nodes=4, num_layers=6, num_experts=4, objective="throughput")
    problem, outlook = placing.problem(2), Outlook(placing, 2)
    most, best = 0.0, busiest([problem])
    assert best is not None
    search = Search(problem)
    for stages in outlook.ideals():
        together = [site for _, members in stages for site in numbers(members)]
        assert len(together) == len(set(together))
        assert all(members >> home & 1 for home, members in stages)
        for order in permutations(Stage(*each) for each in stages):
            route = search.best_in_order(order, throughput=True)
            most = max(most, route.tokens_per_s(problem) if route else 0.0)
    assert 0.8 * best[1].tokens_per_s(problem) < most <= best[1].tokens_per_s(problem) * (1 + 1e-9)
