"""Plans of several pipelines: when there are some, and what is said of them."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from magnetar.cluster.footprint import footprint
from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import Plan, Workload, check_experts
from magnetar.cluster.planning.advice import sufficient_changes
from magnetar.cluster.planning.diff_view import diff_table
from magnetar.cluster.planning.expert_pins import ExpertPin, pin_experts
from magnetar.cluster.planning.explanation import explained
from magnetar.cluster.planning.plan_diff import needed_bytes, plan_diff
from magnetar.cluster.planning.plan_picture import plan_svg
from magnetar.cluster.planning.plan_view import plan_json, plan_table
from magnetar.cluster.planning.planner import plan, predicted
from magnetar.cluster.search.place import MARGIN
from magnetar.errors import InfeasiblePlanError, UsageError
from magnetar.tests.planning import GB, SMALL


def cluster(
    *read_gbps: float | None, memory_gb: float = 8, gbps: float = 0.02, num_devices: int = 1
) -> Inventory:
    nodes = tuple(
        Node(
            host=f"n{number}",
            address="",
            num_cpus=8,
            devices=tuple(
                Device(
                    kind="cuda",
                    index=n,
                    memory_bytes=int(memory_gb * GB),
                    read_gbps=rate,
                    gemm_gflops=rate and 5 * rate,
                )
                for n in range(num_devices)
            ),
        )
        for number, rate in enumerate(read_gbps)
    )
    links = tuple(
        Link(source=a.host, target=b.host, rtt_s=0.02, gbps=gbps)
        for a in nodes
        for b in nodes
        if a is not b
    )
    return Inventory(nodes=nodes, links=links)


def asked(**more: object) -> Workload:
    wishes = {
        "max_context_tokens": 512,
        "max_concurrency": 8,
        "objective": "throughput",
        "separate_experts": True,
    }
    return Workload(**{**wishes, **more})  # type: ignore[arg-type]


FOUR = cluster(100, 100, 100, 100)


def planned(inventory: Inventory = FOUR, **wishes: object) -> Plan:
    return plan(*SMALL, inventory, asked(**wishes))


def test_equal_nodes_behind_slow_links_are_pipelines_of_their_own() -> None:
    found = planned()
    assert [len(each.stages) for each in found.pipelines] == [1, 1, 1, 1]
    assert [each.max_concurrency for each in found.pipelines] == [2, 2, 2, 2]
    assert found.hosts == ("n0", "n1", "n2", "n3")
    one = planned(num_pipelines=1)
    assert found.prediction is not None
    assert one.prediction is not None
    assert found.prediction.tokens_per_s > 1.5 * one.prediction.tokens_per_s
    rates = [each.prediction.tokens_per_s for each in found.pipelines if each.prediction]
    assert found.prediction.tokens_per_s == pytest.approx(sum(rates))


@pytest.mark.parametrize("objective", ["latency", "fit"])
def test_without_a_wish_one_stream_or_few_nodes_need_one_pipeline(objective: str) -> None:
    assert len(planned(objective=objective).pipelines) == 1


@pytest.mark.parametrize("objective", ["latency", "throughput", "fit"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_wished_number_is_kept_whatever_the_goal(objective: str, count: int) -> None:
    found = planned(objective=objective, num_pipelines=count)
    assert len(found.pipelines) == count
    assert found.max_concurrency == 8
    seats = [(stage.host, stage.device) for stage in found.stages]
    assert len(set(seats)) == len(seats)
    for pipeline in found.pipelines:
        assert pipeline.stages[-1].end_layer == SMALL[0].n_layers
        assert [stage.index for stage in pipeline.stages] == list(range(len(pipeline.stages)))


def test_streams_follow_speed() -> None:
    found = planned(cluster(400, 100), max_concurrency=10, num_pipelines=2)
    by_host = {each.stages[0].host: each.max_concurrency for each in found.pipelines}
    assert by_host["n0"] > by_host["n1"] > 0
    assert sum(by_host.values()) == 10


def test_devices_of_one_host_serve_different_pipelines_and_share_its_processors() -> None:
    box = cluster(100, num_devices=2)
    found = planned(box, num_pipelines=2)
    assert {(each.host, each.device) for each in found.stages} == {
        ("n0", "cuda:0"),
        ("n0", "cuda:1"),
    }
    assert {stage.num_threads for stage in found.stages} == {4}
    assert {node.host for node in found.unused} == set()


def test_where_speeds_are_unknown_devices_are_dealt_out_by_memory() -> None:
    found = planned(cluster(None, None, None), num_pipelines=3, objective="latency")
    assert [len(each.stages) for each in found.pipelines] == [1, 1, 1]
    assert found.prediction is None
    assert sum(each.num_kv_blocks for each in found.pipelines) == found.num_kv_blocks


def test_more_pipelines_than_devices_or_sequences_are_refused() -> None:
    with pytest.raises(UsageError, match="5 pipelines on 4 devices for 8 sequences"):
        planned(num_pipelines=5)
    with pytest.raises(UsageError, match="3 pipelines on 4 devices for 2 sequences"):
        planned(num_pipelines=3, max_concurrency=2)


def test_pipelines_that_do_not_fit_are_told_how_many_do() -> None:
    weights = footprint(*SMALL, "bf16")
    need = 0.7 * weights.weights_bytes + weights.workspace_bytes(512)
    small = cluster(100, 100, memory_gb=need / (1 - MARGIN) / GB)
    assert len(planned(small).pipelines) == len(planned(small, num_pipelines=1).pipelines) == 1
    wishes = asked(num_pipelines=2, dtype="bf16")
    (fewer,) = (
        change
        for change in sufficient_changes(*SMALL, small, wishes, "bf16")
        if change.knob == "pipelines"
    )
    assert (fewer.amount, fewer.text) == (1, "--pipelines 1")
    with pytest.raises(InfeasiblePlanError, match="does not fit 2 times"):
        plan(*SMALL, small, wishes)


def test_each_pipeline_is_shown_by_itself() -> None:
    found = planned()
    table = plan_table(found, explained(*SMALL, FOUR, asked(), found))
    assert [line.split(":")[0] for line in table.splitlines() if line.startswith("pipeline")] == [
        f"pipeline {number}" for number in range(4)
    ]
    assert "8 sequences at once on 4 pipelines" in table
    document = json.loads(json.dumps(plan_json(found)))
    assert [len(each["stages"]) for each in document["pipelines"]] == [1, 1, 1, 1]
    assert document["prediction"]["tokens_per_s"] > 0
    picture = ElementTree.fromstring(plan_svg(found, num_experts=2))
    rects = picture.iter("{http://www.w3.org/2000/svg}rect")
    assert len({rect.get("y") for rect in rects if rect.get("rx") == "8"}) == 4


def test_every_pipeline_is_fetched_and_told_in_a_difference() -> None:
    one, four = planned(num_pipelines=1, objective="fit"), planned()
    whole = sum(entry.num_bytes for entry in SMALL[1])
    assert needed_bytes(four, SMALL[1]) == dict.fromkeys(four.hosts, whole)
    diff = plan_diff(one, four, SMALL[1])
    assert ("num_pipelines", 1, 4) in diff.settings
    (used,) = one.hosts
    assert {node.host for node in diff.nodes} == set(four.hosts) - {used}
    assert "and n1 cuda:0 bf16" in diff_table(diff)
    assert plan_diff(four, four, SMALL[1]).is_empty


def test_a_plan_that_runs_is_told_its_times_pipeline_by_pipeline() -> None:
    found = planned()
    untold = replace(
        found, pipelines=tuple(replace(each, prediction=None) for each in found.pipelines)
    )
    again = predicted(untold, *SMALL, FOUR, asked())
    assert again == replace(found, best_possible=None)


def test_pinned_experts_help_the_pipeline_that_their_node_is_part_of() -> None:
    found = planned(cluster(100, 100, 100), num_pipelines=2)
    host = found.pipelines[1].stages[0].host
    other = next(h for h in ("n0", "n1", "n2") if h not in found.pipelines[1].hosts[:1])
    pins = [ExpertPin(host=other, layers=(2,), experts=(1,))]
    pinned = pin_experts(found, pins, *SMALL, cluster(100, 100, 100))
    check_experts(pinned, 2)
    helped = [
        number
        for number, pipeline in enumerate(pinned.pipelines)
        if any(helper.host == other for stage in pipeline.stages for helper in stage.helpers)
    ]
    assert host != other
    assert len(helped) <= 1


@pytest.mark.parametrize("num_nodes", [3, 7])
def test_several_are_never_worse_than_one(num_nodes: int) -> None:
    for gbps in (0.01, 1.2):
        inventory = cluster(*(50 + 40 * n for n in range(num_nodes)), gbps=gbps, memory_gb=2.5)
        free, one = planned(inventory), planned(inventory, num_pipelines=1)
        assert free.prediction is not None
        assert one.prediction is not None
        assert free.best_possible is not None
        assert free.prediction.tokens_per_s >= one.prediction.tokens_per_s * (1 - 1e-9)
        assert free.best_possible >= free.prediction.tokens_per_s * (1 - 1e-9)
