"""Experts pinned to nodes: who holds them then, and every byte counted."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.footprint import footprint
from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import Plan, Workload, check_experts
from magnetar.cluster.planning.expert_pins import ExpertPin, pin_experts
from magnetar.cluster.planning.planner import plan, predicted
from magnetar.cluster.search.place import MARGIN
from magnetar.errors import InfeasiblePlanError, UsageError
from magnetar.tests.planning import GB, model

CONFIG, INDEX = model(n_layers=4, dim=512)
WEIGHTS = footprint(CONFIG, INDEX, "bf16")
EXPERT_BYTES = 3 * 512 * 1792 * 2
HELPER_BYTES = WEIGHTS.workspace_bytes(0)


def node(host: str, memory_bytes: int = 4 * GB) -> Node:
    device = Device(kind="cpu", memory_bytes=memory_bytes)
    return Node(host=host, address="", num_cpus=8, devices=(device,))


INVENTORY = Inventory(nodes=(node("a", 5 * GB), node("b"), node("c")))
WORKLOAD = Workload(max_context_tokens=512, max_concurrency=1, dtype="bf16")


def placed(num_stages: int = 1) -> Plan:
    return plan(CONFIG, INDEX, INVENTORY, replace(WORKLOAD, num_stages=num_stages))


def pinned(*pins: ExpertPin, num_stages: int = 1) -> Plan:
    return pin_experts(placed(num_stages), pins, CONFIG, INDEX, INVENTORY)


def test_no_pin_changes_nothing() -> None:
    assert pinned() == placed()


def test_pinned_experts_move_with_their_bytes() -> None:
    before, after = placed(), pinned(ExpertPin(host="b", layers=(0, 1), experts=(6, 7)))
    (stage,) = after.stages
    (helper,) = stage.helpers
    assert (stage.host, helper.host, helper.device) == ("a", "b", "cpu")
    assert stage.experts == (tuple(range(6)),) * 2 + (tuple(range(8)),) * 2
    assert helper.experts == ((6, 7), (6, 7), (), ())
    assert helper.weights_bytes == 4 * EXPERT_BYTES
    assert stage.weights_bytes == before.stages[0].weights_bytes - 4 * EXPERT_BYTES
    assert stage.free_bytes == before.stages[0].free_bytes + 4 * EXPERT_BYTES
    assert helper.free_bytes == 4 * GB - 4 * EXPERT_BYTES - HELPER_BYTES
    assert [idle.host for idle in after.unused] == ["c"]
    assert after.hosts == ("a", "b")


def test_a_copy_stays_where_it_was_too() -> None:
    (stage,) = pinned(ExpertPin(host="b", layers=(2,), experts=(1,), is_copy=True)).stages
    assert stage.experts == (tuple(range(8)),) * 4
    assert stage.holders(2, 1) == (-1, 0)
    assert stage.weights_bytes == placed().stages[0].weights_bytes


def test_two_stages_may_help_each_other_and_share_their_processors() -> None:
    first, second = pinned(
        ExpertPin(host="a", layers=(0, 1, 2, 3), experts=(0, 1)),
        ExpertPin(host="b", layers=(0, 1, 2, 3), experts=(2, 3)),
        num_stages=2,
    ).stages
    assert {first.host, second.host} == {"a", "b"}
    for stage, other in ((first, second), (second, first)):
        (helper,) = stage.helpers
        assert helper.host == other.host
        assert (stage.num_threads, helper.num_threads) == (4, 4)


def test_all_experts_on_their_own_stage_need_no_helper() -> None:
    (stage,) = pinned(ExpertPin(host="a", layers=(0, 1, 2, 3))).stages
    assert (stage.experts, stage.helpers) == (None, ())


PINS = st.builds(
    ExpertPin,
    host=st.sampled_from("abc"),
    layers=st.sets(st.integers(0, 3), min_size=1).map(lambda ids: tuple(sorted(ids))),
    experts=st.none() | st.sets(st.integers(0, 7), min_size=1).map(lambda ids: tuple(sorted(ids))),
    is_copy=st.booleans(),
)


@given(st.lists(PINS, min_size=1, max_size=4), st.integers(1, 3))
def test_every_expert_stays_somewhere_and_every_byte_is_counted(
    pins: list[ExpertPin], num_stages: int
) -> None:
    before, after = placed(num_stages), pinned(*pins, num_stages=num_stages)
    check_experts(after, 8)
    last = pins[-1]
    for layer in last.layers:
        stage = next(s for s in after.stages if s.first_layer <= layer < s.end_layer)
        hosts = [stage.host, *(helper.host for helper in stage.helpers)]
        for expert in range(8) if last.experts is None else last.experts:
            assert last.host in {hosts[holder + 1] for holder in stage.holders(layer, expert)}
    attention = sum(stage.weights_bytes for stage in before.stages) - 32 * EXPERT_BYTES
    weights, num_held = 0, 0
    for stage in after.stages:
        own = stage.experts or ((0,) * 8,) * (stage.end_layer - stage.first_layer)
        shares = [own, *(helper.experts for helper in stage.helpers)]
        num_held += sum(len(ids) for experts in shares for ids in experts)
        weights += stage.weights_bytes + sum(helper.weights_bytes for helper in stage.helpers)
    assert weights == attention + num_held * EXPERT_BYTES


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        (ExpertPin(host="x", layers=(0,)), "pinned to x, but the nodes are a, b, c"),
        (ExpertPin(host="b", layers=(4,)), "there is no layer 4: the model has 4 layers"),
        (ExpertPin(host="b", layers=(0,), experts=(8,)), "there is no expert 8"),
    ],
)
def test_what_is_not_there_cannot_be_pinned(pin: ExpertPin, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        pinned(pin)


def test_a_node_without_the_memory_is_named() -> None:
    small = Inventory(nodes=(node("a", 5 * GB), node("b", HELPER_BYTES + EXPERT_BYTES)))
    with pytest.raises(InfeasiblePlanError, match=rf"pinned to b .*{MARGIN:.0%} stays free"):
        pin_experts(placed(), [ExpertPin(host="b", layers=(0,))], CONFIG, INDEX, small)


def test_what_a_pinned_helper_takes_is_in_the_times_of_steps_and_of_prompts() -> None:
    def times(rtt_s: float) -> tuple[float, float]:
        nodes = tuple(
            replace(each, devices=(replace(each.devices[0], read_gbps=50.0, gemm_gflops=500.0),))
            for each in INVENTORY.nodes
        )
        pairs = ((a.host, b.host) for a in nodes for b in nodes if a is not b)
        links = tuple(Link(source=a, target=b, rtt_s=rtt_s, gbps=1.0) for a, b in pairs)
        inventory = Inventory(nodes=nodes, links=links)
        workload = replace(WORKLOAD, separate_experts=True)
        found = plan(CONFIG, INDEX, inventory, workload)
        pin = ExpertPin(host="b", layers=(0, 1, 2, 3), experts=(4, 5, 6, 7))
        apart = pin_experts(found, (pin,), CONFIG, INDEX, inventory)
        told = predicted(apart, CONFIG, INDEX, inventory, workload).prediction
        assert told is not None
        return told.round_trip_s, told.prefill_s

    near, far = times(0.0), times(0.1)
    # Four layers, and of two experts of a token one is mostly there; a prompt needs all.
    assert far[0] - near[0] == pytest.approx(4 * 0.1 * (1 - 6 / 28), rel=0.01)
    assert far[1] - near[1] == pytest.approx(4 * 0.1, rel=0.01)
