"""What moves from one plan to another."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.machines import Device, Inventory, Node
from magnetar.cluster.plan import ExpertHost, Pipeline, Plan, StagePlan, Workload
from magnetar.cluster.planning.diff_view import diff_table
from magnetar.cluster.planning.placement import without_times
from magnetar.cluster.planning.plan_diff import plan_diff, with_memory_of
from magnetar.cluster.planning.planner import plan, predicted
from magnetar.tests.planning import GB, MIXTRAL

CONFIG, INDEX = MIXTRAL


def stage(index: int, host: str, first: int, end: int, **changes: object) -> StagePlan:
    plain = StagePlan(
        index=index,
        host=host,
        device="cpu",
        first_layer=first,
        end_layer=end,
        has_embeddings=first == 0,
        has_output=end == 32,
        dtype="bf16",
        num_threads=1,
        weights_bytes=(end - first) * GB,
        kv_bytes=GB,
        free_bytes=2 * GB,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def plan_of(*stages: StagePlan) -> Plan:
    pipeline = Pipeline(stages=stages, num_kv_blocks=8, max_concurrency=1)
    return Plan(pipelines=(pipeline,), max_context_tokens=128)


def cut(*ends: int) -> Plan:
    starts = (0, *ends[:-1])
    spans = zip(starts, ends, strict=True)
    return plan_of(*(stage(n, f"n{n}", *span) for n, span in enumerate(spans)))


BEFORE = cut(10, 32)


def test_the_same_plan_has_no_diff() -> None:
    diff = plan_diff(BEFORE, BEFORE, INDEX)
    assert diff.is_empty
    assert not diff.nodes
    assert diff_table(diff) == "no changes: the plan is the one that runs"


def test_layers_that_move_together_are_one_move() -> None:
    diff = plan_diff(BEFORE, cut(14, 32), INDEX)
    (move,) = diff.moves
    assert (move.first_layer, move.end_layer, move.experts) == (10, 14, None)
    assert (move.before, move.after) == (("n1 cpu bf16",), ("n0 cpu bf16",))
    four_layers = sum(e.num_bytes for layer in range(10, 14) for e in INDEX.layer(layer))
    assert [(n.host, n.gained_bytes, n.dropped_bytes) for n in diff.nodes] == [
        ("n0", four_layers, 0),
        ("n1", 0, four_layers),
    ]
    table = diff_table(diff, ["nobody knows"]).splitlines()
    assert "~ layers 10-13: n1 cpu bf16 -> n0 cpu bf16" in table
    assert "= 11.6 GB to load and 11.6 GB no longer, in all" in table
    assert table[-1] == "note: nobody knows"


def test_experts_that_leave_for_a_helper_are_told_apart() -> None:
    helper = ExpertHost(
        host="h",
        device="cpu",
        num_threads=1,
        weights_bytes=GB,
        free_bytes=0,
        experts=((6, 7),) * 22,
    )
    own = ((0, 1, 2, 3, 4, 5),) * 22
    after = plan_of(BEFORE.stages[0], replace(BEFORE.stages[1], experts=own, helpers=(helper,)))
    (move,) = plan_diff(BEFORE, after, INDEX).moves
    assert (move.first_layer, move.end_layer, move.experts) == (10, 32, (6, 7))
    assert move.after == ("h cpu bf16",)


def test_another_dtype_moves_the_layers_but_fetches_nothing() -> None:
    first, second = BEFORE.stages
    diff = plan_diff(BEFORE, plan_of(first, replace(second, dtype="int8")), INDEX)
    (move,) = diff.moves
    assert (move.first_layer, move.end_layer) == (10, 32)
    assert not diff.nodes


def test_another_number_of_stages_on_the_same_node_is_told() -> None:
    after = plan_of(stage(0, "n0", 0, 10), stage(1, "n0", 10, 32))
    diff = plan_diff(plan_of(stage(0, "n0", 0, 32)), after, INDEX)
    assert not diff.nodes
    assert diff_table(diff) == "~ stages: 1 -> 2"


def test_settings_are_told() -> None:
    diff = plan_diff(BEFORE, replace(BEFORE, max_context_tokens=64), INDEX)
    assert diff.settings == (("max_context_tokens", 128, 64),)
    assert not diff.is_empty


@given(st.integers(1, 31), st.integers(1, 31))
def test_what_nodes_gain_and_drop_is_what_moves(a: int, b: int) -> None:
    diff = plan_diff(cut(a, 32), cut(b, 32), INDEX)
    moved = {layer for move in diff.moves for layer in range(move.first_layer, move.end_layer)}
    assert moved == set(range(min(a, b), max(a, b)))
    num_bytes = sum(e.num_bytes for layer in moved for e in INDEX.layer(layer))
    assert sum(node.gained_bytes for node in diff.nodes) == num_bytes
    assert sum(node.dropped_bytes for node in diff.nodes) == num_bytes


def test_memory_of_the_running_plan_counts_as_free() -> None:
    devices = (Device(kind="cpu", memory_bytes=GB),)
    nodes = tuple(
        Node(host=host, address="", num_cpus=1, devices=devices) for host in ("n0", "n1", "n2")
    )
    freed = with_memory_of(BEFORE, Inventory(nodes=nodes))
    memory = {node.host: node.devices[0].memory_bytes for node in freed.nodes}
    assert memory == {"n0": 13 * GB, "n1": 25 * GB, "n2": GB}


def test_a_plan_that_runs_is_told_its_times_in_other_traffic() -> None:
    devices = (Device(kind="cpu", memory_bytes=60 * GB, read_gbps=50),)
    inventory = Inventory(
        nodes=tuple(
            Node(host=host, address="", num_cpus=1, devices=devices) for host in ("n0", "n1")
        )
    )
    wishes = Workload(max_context_tokens=512, max_concurrency=1, separate_experts=True)
    runs = plan(CONFIG, INDEX, inventory, wishes)
    (pipeline,) = runs.pipelines
    untold = replace(runs, pipelines=(replace(pipeline, prediction=None),))
    again = predicted(untold, CONFIG, INDEX, inventory, wishes)
    assert runs.best_possible is not None
    # How good a plan could be is said where one is searched.
    assert without_times(again) == replace(without_times(runs), best_possible=None)
    assert again.prediction is not None
    assert runs.prediction is not None
    assert again.prediction.round_trip_s == pytest.approx(runs.prediction.round_trip_s)
    traffic = replace(wishes, popularity=((1.0, 0.4, *(0.1,) * 6),) * 32)
    told = predicted(runs, CONFIG, INDEX, inventory, traffic)
    assert told.prediction is not None
    assert told.stages[0].experts == runs.stages[0].experts
    unknown = replace(
        inventory,
        nodes=tuple(
            replace(node, devices=(replace(devices[0], read_gbps=None),))
            for node in inventory.nodes
        ),
    )
    assert predicted(runs, CONFIG, INDEX, unknown, wishes).prediction is None
