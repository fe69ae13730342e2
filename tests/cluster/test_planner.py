"""Placement: every byte counted, few stages, reasons and numbers where it cannot be."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.footprint import footprint, stored_dtype
from magnetar.cluster.machines import Device, Inventory, Node
from magnetar.cluster.plan import NodeWish, Plan, UnusedNode, Workload
from magnetar.cluster.planning.dtype_ladder import dtype_choices
from magnetar.cluster.planning.plan_view import plan_json, plan_table
from magnetar.cluster.planning.planner import MARGIN, plan
from magnetar.errors import InfeasiblePlanError, UsageError
from magnetar.settings import KV_BLOCK_TOKENS
from magnetar.tests.planning import GB, MIXTRAL, SMALL, model


def node(host: str, gigabytes: float, *, cpus: int = 8, held: int = 0) -> Node:
    memory = Device(kind="cpu", memory_bytes=int(gigabytes * GB))
    return Node(host=host, address="", num_cpus=cpus, devices=(memory,), held_bytes=held)


def cluster(*nodes: Node) -> Inventory:
    return Inventory(nodes=nodes)


def asked(context: int = 4096, concurrency: int = 1, **more: object) -> Workload:
    fields: dict[str, object] = {"max_context_tokens": context, "max_concurrency": concurrency}
    fields["dtype"] = "bf16"
    fields |= more
    return Workload(**fields)  # type: ignore[arg-type]


def layers(found: Plan) -> list[int]:
    return [stage.end_layer - stage.first_layer for stage in found.stages]


def test_mixtral_weighs_what_its_release_weighs() -> None:
    assert footprint(*MIXTRAL, "bf16").weights_bytes == pytest.approx(93.4 * GB, rel=0.01)


def test_a_machine_that_holds_everything_gets_one_stage() -> None:
    found = plan(*MIXTRAL, cluster(node("a", 128)), asked())
    (stage,) = found.stages
    assert (stage.first_layer, stage.end_layer, stage.dtype) == (0, 32, "bf16")
    assert stage.has_embeddings
    assert stage.has_output
    assert stage.num_threads == 8


def test_four_stages_on_one_machine_share_its_memory_and_take_turns_on_its_cores() -> None:
    found = plan(*MIXTRAL, cluster(node("a", 128)), asked(num_stages=4))
    assert layers(found) == [8, 8, 8, 8]
    assert {stage.num_threads for stage in found.stages} == {8}
    assert found.pipelines[0].steps_at_once == 1
    assert len({stage.free_bytes for stage in found.stages}) == 1


def test_stages_on_several_machines_decode_at_once() -> None:
    found = plan(*MIXTRAL, cluster(node("a", 64), node("b", 64)), asked(num_stages=4))
    assert {stage.num_threads for stage in found.stages} == {8}
    assert found.pipelines[0].steps_at_once == 2


def test_takes_as_few_nodes_as_fit_and_says_why_the_others_idle() -> None:
    found = plan(*MIXTRAL, cluster(*(node(name, 64) for name in "abcd"), node("z", 1)), asked())
    assert len(found.stages) == 2
    reasons = {idle.host: idle.reason for idle in found.unused}
    assert set(reasons) == {"c", "d", "z"}
    assert "not needed" in reasons["c"]
    assert "too small" in reasons["z"]


def test_larger_nodes_come_first_and_smaller_ones_get_what_fits() -> None:
    found = plan(*MIXTRAL, cluster(node("small", 30), node("large", 80)), asked())
    assert [stage.host for stage in found.stages] == ["large", "small"]
    assert layers(found)[0] > layers(found)[1]


def test_a_node_that_holds_the_release_is_preferred_to_a_larger_one() -> None:
    found = plan(*MIXTRAL, cluster(node("big", 200), node("held", 128, held=9)), asked())
    assert [stage.host for stage in found.stages] == ["held"]


def test_bytes_held_never_cost_another_stage() -> None:
    found = plan(*MIXTRAL, cluster(node("big", 200), node("held", 60, held=9)), asked())
    assert [stage.host for stage in found.stages] == ["big"]


def test_an_accelerator_is_preferred_and_the_cpu_helps_when_it_is_too_small() -> None:
    def machine(cuda_gb: int) -> Node:
        cuda = Device(kind="cuda", memory_bytes=cuda_gb * GB)
        return dataclasses.replace(
            node("a", 100), devices=(Device(kind="cpu", memory_bytes=100 * GB), cuda)
        )

    fits = plan(*MIXTRAL, cluster(machine(141)), asked())
    assert [stage.device for stage in fits.stages] == ["cuda:0"]
    helped = plan(*MIXTRAL, cluster(machine(24)), asked(num_stages=2))
    assert {stage.device for stage in helped.stages} == {"cuda:0", "cpu"}


def test_the_context_shrinks_with_a_note_when_nobody_asked_for_it() -> None:
    found = plan(*MIXTRAL, cluster(node("a", 128)), asked(32768, 8, min_context_tokens=256))
    assert 256 <= found.max_context_tokens < 32768
    assert str(found.max_context_tokens) in found.concessions[0].text
    assert "shortened" in plan_table(found)


def test_the_context_shrinks_as_little_as_it_must() -> None:
    machine = cluster(node("a", 128))
    found = plan(*MIXTRAL, machine, asked(32768, 8, min_context_tokens=256))
    with pytest.raises(InfeasiblePlanError):
        plan(*MIXTRAL, machine, asked(found.max_context_tokens + KV_BLOCK_TOKENS, 8))


def test_a_context_that_was_asked_for_is_never_shortened() -> None:
    with pytest.raises(InfeasiblePlanError, match="8 sequences of 32768 tokens"):
        plan(*MIXTRAL, cluster(node("a", 128)), asked(32768, 8))


def test_an_infeasible_plan_says_the_numbers_of_every_node() -> None:
    with pytest.raises(InfeasiblePlanError) as caught:
        plan(*MIXTRAL, cluster(node("alpha", 16), node("beta", 8)), asked())
    said = str(caught.value)
    for part in ("93.4 GB", "14.4 GB of 16.0 GB cpu: alpha", "7.2 GB of 8.0 GB cpu: beta"):
        assert part in said


def test_float32_is_weighed_at_four_bytes() -> None:
    half, full = (plan(*SMALL, cluster(node("a", 64)), asked(dtype=d)) for d in ("bf16", "fp32"))
    assert full.stages[0].weights_bytes == 2 * half.stages[0].weights_bytes
    assert full.stages[0].kv_bytes == 2 * half.stages[0].kv_bytes


def test_the_checkpoint_decides_the_dtype_when_nobody_does() -> None:
    assert stored_dtype(model(n_layers=1, dim=128, dtype="fp16")[1]) == "fp16"


def test_what_does_not_fit_as_stored_is_held_in_8_bits_with_a_note() -> None:
    found = plan(*MIXTRAL, cluster(node("a", 80)), asked(dtype=None))
    assert {stage.dtype for stage in found.stages} == {"int8"}
    (conceded,) = found.concessions
    assert "stage 0 holds int8 in place of bf16, which frees 45" in conceded.text
    assert conceded.knob == "dtype"
    assert 44e9 < conceded.freed_bytes < 46e9
    with pytest.raises(
        InfeasiblePlanError, match="is enough, the cheapest first:\n    --dtype int8"
    ):
        plan(*MIXTRAL, cluster(node("a", 80)), asked())


def test_of_many_ways_to_lower_dtypes_the_one_that_lowers_all_is_always_tried() -> None:
    choices = list(dtype_choices({"bf16": [1] * 10, "int8": [3] * 10}, 26))
    assert choices[-1] == ("int8",) * 10
    assert len(choices) < 20


def test_a_node_that_is_excluded_gets_nothing() -> None:
    nodes = cluster(node("a", 200), node("b", 150))
    found = plan(*MIXTRAL, nodes, asked(nodes=(NodeWish(host="a", exclude=True),)))
    assert [stage.host for stage in found.stages] == ["b"]
    assert found.unused == (UnusedNode(host="a", reason="excluded, as asked"),)


def test_a_node_with_a_limit_gets_no_more_than_that() -> None:
    nodes = cluster(node("a", 200), node("b", 70))
    limit = NodeWish(host="a", memory_bytes=60 * GB)
    found = plan(*MIXTRAL, nodes, asked(nodes=(limit,)))
    (stage,) = (stage for stage in found.stages if stage.host == "a")
    assert stage.weights_bytes + stage.kv_bytes < 54 * GB


def test_layers_are_where_they_are_pinned() -> None:
    nodes = cluster(node("a", 70), node("b", 70), node("c", 70))
    pins = (NodeWish(host="c", layers=(0, 5)), NodeWish(host="a", layers=(20, 32)))
    found = plan(*MIXTRAL, nodes, asked(nodes=pins))
    spans = {stage.host: (stage.first_layer, stage.end_layer) for stage in found.stages}
    assert spans == {"c": (0, 5), "b": (5, 20), "a": (20, 32)}
    assert found.prediction is None


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ((NodeWish(host="z", exclude=True),), "a wish for z, which is no node; nodes: a, b"),
        ((NodeWish(host="a", exclude=True, layers=(0, 3)),), "a is excluded and layers 0-2"),
        ((NodeWish(host="a", layers=(30, 40)),), "layers 30-39 are pinned to a; the model has"),
        (
            (NodeWish(host="a", layers=(0, 9)), NodeWish(host="b", layers=(8, 12))),
            "layers 0-8 are pinned to a and 8-11 to b; a layer has one node",
        ),
        ((NodeWish(host="a", memory_bytes=0),), "a may use 0 bytes"),
        ((NodeWish(host="a"), NodeWish(host="a")), "two wishes for a"),
    ],
)
def test_wishes_that_contradict_are_named(wishes: tuple[NodeWish, ...], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(*MIXTRAL, cluster(node("a", 200), node("b", 200)), asked(nodes=wishes))


def test_more_stages_than_layers_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="40 stages for a model of 32 layers"):
        plan(*MIXTRAL, cluster(node("a", 128)), asked(num_stages=40))


def test_json_has_the_field_names_of_the_plan() -> None:
    found = plan(*SMALL, cluster(node("a", 64)), asked())
    loaded = json.loads(json.dumps(plan_json(found)))
    (pipeline,) = loaded["pipelines"]
    assert pipeline["stages"][0]["host"] == "a"
    assert pipeline["num_kv_blocks"] == found.num_kv_blocks
    assert loaded["max_concurrency"] == found.max_concurrency


@settings(max_examples=60, deadline=None)
@given(
    memories=st.lists(st.integers(300, 3000), min_size=1, max_size=5),
    context=st.integers(1, 4096),
    concurrency=st.integers(1, 8),
    num_stages=st.none() | st.integers(1, 6),
)
def test_every_plan_covers_all_layers_within_every_memory(
    memories: list[int], context: int, concurrency: int, num_stages: int | None
) -> None:
    nodes = [node(f"n{i}", megabytes / 1000) for i, megabytes in enumerate(memories)]
    workload = asked(context, concurrency, num_stages=num_stages)
    try:
        found = plan(*SMALL, cluster(*nodes), workload)
    except InfeasiblePlanError:
        return
    assert found == plan(*SMALL, cluster(*nodes), workload)
    assert found.stages[0].first_layer == 0
    assert found.stages[-1].end_layer == 6
    for before, after in zip(found.stages, found.stages[1:], strict=False):
        assert before.end_layer == after.first_layer
    assert sum(s.weights_bytes for s in found.stages) == footprint(*SMALL, "bf16").weights_bytes
    assert num_stages in (None, len(found.stages))
    for stage in found.stages:
        memory = next(n for n in nodes if n.host == stage.host).devices[0].memory_bytes
        assert stage.end_layer > stage.first_layer
        assert stage.free_bytes >= int(memory * MARGIN) - 1
    assert found.num_kv_blocks * KV_BLOCK_TOKENS >= context * concurrency
    assert {s.host for s in found.stages} | {u.host for u in found.unused} == {
        n.host for n in nodes
    }


@settings(max_examples=40, deadline=None)
@given(memories=st.lists(st.integers(300, 2000), min_size=2, max_size=4), data=st.data())
def test_more_memory_never_makes_a_plan_infeasible(
    memories: list[int], data: st.DataObject
) -> None:
    nodes = [node(f"n{i}", megabytes / 1000) for i, megabytes in enumerate(memories)]
    try:
        before = plan(*SMALL, cluster(*nodes), asked(1024, 4))
    except InfeasiblePlanError:
        return
    grown = data.draw(st.integers(0, len(nodes) - 1))
    nodes[grown] = node(f"n{grown}", 100)
    after = plan(*SMALL, cluster(*nodes), asked(1024, 4))
    assert len(after.stages) <= len(before.stages)
