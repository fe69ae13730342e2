"""The bound: never beaten by the best of all plans, near to it, and told with the plan."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.machines import Device, Inventory, Node
from magnetar.cluster.plan import NodeWish, Objective, Workload
from magnetar.cluster.planning.plan_picture import plan_svg
from magnetar.cluster.planning.plan_view import plan_json, plan_table
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.bound import least_round_trip_s, most_tokens_per_s
from magnetar.cluster.search.search import Search
from magnetar.tests.planning import GB, MIXTRAL, every_route, random_problem
from magnetar.tests.shared_experts import every_plan, small_cluster

BATCHES = (8, 4, 2)
# The bound may leave out plans worse than what was found; a search that found less must not matter.
WORSE = 1.3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_sites=st.integers(1, 4), num_layers=st.integers(1, 6))
def test_no_route_of_all_is_better_than_the_bounds(
    seed: int, num_sites: int, num_layers: int
) -> None:
    problems = [
        random_problem(seed, num_sites=num_sites, num_layers=num_layers, step_tokens=tokens)
        for tokens in BATCHES
    ]
    routes = [(problem, route) for problem in problems for route in every_route(problem)]
    if not routes:
        return
    least = min(route.round_trip_s for problem, route in routes if problem is problems[-1])
    assert least_round_trip_s(problems[-1], WORSE * least) <= least * (1 + 1e-9)
    most = max(route.tokens_per_s(problem) for problem, route in routes)
    assert most_tokens_per_s(problems, most / WORSE) >= most * (1 - 1e-9)


@pytest.mark.parametrize(
    ("num_nodes", "num_layers", "num_experts"), [(2, 6, 4), (3, 3, 4), (3, 4, 2), (4, 3, 2)]
)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_no_plan_with_experts_anywhere_is_better_than_the_bounds(
    seed: int, num_nodes: int, num_layers: int, num_experts: int, objective: Objective
) -> None:
    placing = small_cluster(
        seed, num_nodes=num_nodes, num_layers=num_layers, num_experts=num_experts
    )
    if objective == "latency":
        least = min((trip for trip, _ in every_plan(placing, 1)), default=None)
        if least is not None:
            found = least_round_trip_s(placing.problem(1), WORSE * least)
            assert 0.55 * least <= found <= least * (1 + 1e-9)
        return
    rates = [
        min(tokens / bottleneck, 8 / trip)
        for tokens in BATCHES
        for trip, bottleneck in every_plan(placing, tokens)
    ]
    if rates:
        most = max(rates)
        problems = [placing.problem(tokens) for tokens in BATCHES]
        assert most * (1 - 1e-9) <= most_tokens_per_s(problems, most / WORSE) <= 1.8 * most


def test_where_links_cost_nothing_and_layers_are_alike_the_bound_is_the_best_route() -> None:
    problem = random_problem(3, num_sites=4, num_layers=6)
    sites = tuple(
        replace(
            site,
            seconds_L=site.seconds_L[-1] / 6 * range(7),
            needs_L=site.needs_L[-1] / 6 * range(7),
        )
        for site in problem.sites
    )
    free = 0.0 * problem.hop_s
    problem = replace(problem, sites=sites, hop_s=free, return_s=free, transfer_s=free)
    found = Search(problem).fastest()
    assert found is not None
    bound = least_round_trip_s(problem, 2 * found.round_trip_s)
    assert bound == pytest.approx(found.round_trip_s, rel=1e-4)


def cluster(count: int) -> Inventory:
    return Inventory(
        nodes=tuple(
            Node(
                host=f"n{number:02}",
                address="",
                num_cpus=8,
                devices=(Device(kind="cpu", memory_bytes=30 * GB, read_gbps=40.0 + 7 * number),),
            )
            for number in range(count)
        )
    )


def workload(objective: Objective = "throughput") -> Workload:
    return Workload(
        max_context_tokens=2048, max_concurrency=8, objective=objective, separate_experts=True
    )


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_plan_tells_its_bound_in_every_form(objective: Objective) -> None:
    found = plan(*MIXTRAL, cluster(12), workload(objective))
    assert found.gap is not None
    assert 0 < found.gap < 0.8
    said = f"within {found.gap:.1%} of the best possible under this model"
    assert said in plan_table(found)
    assert said in plan_svg(found, num_experts=8)
    told = json.loads(json.dumps(plan_json(found)))
    assert told["gap"] == found.gap
    assert told["best_possible"] == found.best_possible
    assert found == plan(*MIXTRAL, cluster(12), workload(objective))


def test_a_plan_that_was_found_among_all_is_its_own_bound() -> None:
    alone = replace(workload(), separate_experts=False)
    found = plan(*MIXTRAL, cluster(6), alone)
    assert found.prediction is not None
    assert found.best_possible == pytest.approx(found.prediction.tokens_per_s)
    assert "bound: no plan is better under this model" in plan_table(found)


def test_pins_and_a_number_of_stages_bind_the_bound_too() -> None:
    wishes = replace(workload(), num_pipelines=1)
    free = plan(*MIXTRAL, cluster(10), wishes)
    pinned = plan(
        *MIXTRAL, cluster(10), replace(wishes, nodes=(NodeWish(host="n00", layers=(0, 6)),))
    )
    assert free.best_possible is not None
    assert pinned.best_possible is not None
    assert pinned.best_possible < free.best_possible


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    problem = random_problem(1, num_sites=4, num_layers=6, step_tokens=1)
    route = Search(problem).fastest()
    assert route is not None
    least_round_trip_s(problem, route.round_trip_s)
    assert capfd.readouterr() == ("", "")


def test_the_solver_is_only_imported_where_a_bound_is_asked_for() -> None:
    script = (
        "import sys, magnetar.cli, magnetar.cluster.planning.planner; "
        "print('highspy' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "False"
