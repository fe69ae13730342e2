"""Machines that cannot be, and requests that contradict themselves: errors that say which value."""

import contextlib
import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import NodeWish, Plan, Workload
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.planning.soundness import check_inventory
from magnetar.errors import InfeasiblePlanError, InventoryError, MagnetarError, UsageError
from magnetar.tests.planning import GB, MIXTRAL, SMALL

CPU = Device(kind="cpu", memory_bytes=4 * GB, read_gbps=50.0)
A = Node(host="a", address="", num_cpus=8, devices=(CPU,))
B = dataclasses.replace(A, host="b")
LINK = Link(source="a", target="b", rtt_s=0.001, gbps=1.0)
ASKED = Workload(max_context_tokens=512, max_concurrency=2)


def with_device(**changes: Any) -> Inventory:
    return Inventory(
        nodes=(dataclasses.replace(A, devices=(dataclasses.replace(CPU, **changes),)),)
    )


def with_node(**changes: Any) -> Inventory:
    return Inventory(nodes=(dataclasses.replace(A, **changes),))


def with_link(**changes: Any) -> Inventory:
    return Inventory(nodes=(A, B), links=(dataclasses.replace(LINK, **changes),))


@pytest.mark.parametrize(
    ("inventory", "told"),
    [
        (with_device(memory_bytes=-1), "a cpu:0: -1 bytes of memory"),
        (with_device(memory_bytes=1 << 60), "1152921504606846976 bytes of memory"),
        (with_device(read_gbps=0.0), "a cpu:0: reads at 0 GB/s"),
        (with_device(read_gbps=-3.5), "reads at -3.5 GB/s"),
        (with_device(read_gbps=math.nan), "reads at nan GB/s"),
        (with_device(read_gbps=math.inf), "reads at inf GB/s"),
        (with_device(dtype_read_gbps=(("int8", 0.0),)), "reads int8 at 0 GB/s"),
        (with_device(gemm_gflops=-1.0), "computes at -1 GFLOP/s"),
        (with_device(layer_overhead_s=-0.1), "a layer takes -0.1 s"),
        (with_device(step_overhead_s=math.nan), "a step takes nan s"),
        (with_device(helper_overhead_s=5.0), "asking a helper takes 5 s"),
        (with_node(num_cpus=0), "a: 0 processors"),
        (with_node(devices=()), "a: no device"),
        (with_node(devices=(CPU, CPU)), "2 devices are cpu:0"),
        (with_node(host=""), "a node has no name"),
        (with_node(held_bytes=-7), "-7 bytes held"),
        (with_link(gbps=0.0), "link a to b: 0 GB/s"),
        (with_link(gbps=math.nan), "link a to b: nan GB/s"),
        (with_link(rtt_s=-1.0), "a round trip of -1 s"),
        (with_link(rtt_s=1e9), "a round trip of 1e+09 s"),
        (with_link(overhead_s=math.inf), "messages take inf s"),
        (with_link(target="z"), "'z' is no node; nodes: a, b"),
        (Inventory(nodes=(A, A)), "2 nodes are called 'a'"),
    ],
)
def test_a_number_that_cannot_be_is_named_with_its_place(inventory: Inventory, told: str) -> None:
    with pytest.raises(InventoryError) as caught:
        plan(*SMALL, inventory, ASKED)
    assert told in str(caught.value)


def test_all_that_is_wrong_is_told_at_once_and_what_is_right_passes() -> None:
    wrong = Inventory(
        nodes=tuple(dataclasses.replace(A, host=f"n{n}", num_cpus=0) for n in range(12))
    )
    with pytest.raises(InventoryError, match=r"n0: 0 processors.*n7: 0 processors.*; and 4 more"):
        check_inventory(wrong)
    check_inventory(with_link())
    check_inventory(with_device(memory_bytes=0, read_gbps=None))


def test_no_node_is_an_error_and_one_is_enough() -> None:
    with pytest.raises(InfeasiblePlanError, match="no node to place the model on; start one"):
        plan(*SMALL, Inventory(nodes=()), ASKED)
    assert len(plan(*SMALL, Inventory(nodes=(A,)), ASKED).stages) == 1


def test_where_no_node_has_room_for_one_layer_that_is_said() -> None:
    nodes = tuple(dataclasses.replace(A, host=f"n{number}") for number in range(40))
    with pytest.raises(
        InfeasiblePlanError, match=r"no node has room for one layer\n  one layer: \d.* GB"
    ):
        plan(*MIXTRAL, Inventory(nodes=nodes), dataclasses.replace(ASKED, dtype="bf16"))


def test_pins_that_need_more_than_their_node_has_are_named() -> None:
    small = dataclasses.replace(CPU, memory_bytes=60 * GB)
    large = dataclasses.replace(CPU, memory_bytes=150 * GB)
    inventory = Inventory(
        nodes=(
            dataclasses.replace(A, devices=(small,)),
            dataclasses.replace(B, devices=(large,)),
        )
    )
    asked = dataclasses.replace(ASKED, nodes=(NodeWish(host="a", layers=(0, 30)),), dtype="bf16")
    with pytest.raises(InfeasiblePlanError) as caught:
        plan(*MIXTRAL, inventory, asked)
    assert "layers 0-29 on a need 8" in str(caught.value)
    assert ", 54.0 GB can be used there" in str(caught.value)
    fewer = dataclasses.replace(asked, nodes=(NodeWish(host="a", layers=(0, 10)),))
    assert plan(*MIXTRAL, inventory, fewer).stages[0].end_layer == 10


@pytest.mark.parametrize(
    ("wishes", "told"),
    [
        ((NodeWish(host="z"),), "z, which is no node"),
        ((NodeWish(host="a"), NodeWish(host="a")), "two wishes for a"),
        ((NodeWish(host="a", exclude=True), NodeWish(host="b", exclude=True)), "every node is"),
        ((NodeWish(host="a", exclude=True, layers=(0, 2)),), "excluded and layers 0-1 are pinned"),
        ((NodeWish(host="a", layers=(0, 3)), NodeWish(host="b", layers=(2, 6))), "a layer has one"),
        ((NodeWish(host="a", layers=(4, 9)),), "the model has layers 0 to 5"),
        ((NodeWish(host="a", memory_bytes=0),), "may use 0 bytes"),
    ],
)
def test_wishes_that_contradict_are_named(wishes: tuple[NodeWish, ...], told: str) -> None:
    with pytest.raises((UsageError, InfeasiblePlanError)) as caught:
        plan(*SMALL, with_link(), dataclasses.replace(ASKED, nodes=wishes))
    assert told in str(caught.value)


SIZES = st.one_of(st.integers(0, 3 * GB), st.sampled_from([-1, 0, 1, 1 << 51]))
RATES = st.one_of(
    st.none(), st.floats(1, 3000), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-300, 1e9])
)
SECONDS = st.one_of(st.floats(0, 0.2), st.sampled_from([0.0, -1.0, math.nan, math.inf, 60.0]))
HOSTS = st.sampled_from(["a", "b", "c"])
DEVICES = st.builds(
    Device,
    kind=st.sampled_from(["cpu", "cuda"]),
    index=st.integers(0, 2),
    memory_bytes=SIZES,
    read_gbps=RATES,
    gemm_gflops=RATES,
    layer_overhead_s=SECONDS,
    helper_overhead_s=SECONDS,
)
NODES = st.builds(
    Node,
    host=HOSTS,
    address=st.just(""),
    num_cpus=st.integers(0, 4),
    devices=st.lists(DEVICES, max_size=2).map(tuple),
    held_bytes=st.integers(-1, GB),
)
LINKS = st.builds(
    Link,
    source=HOSTS,
    target=HOSTS,
    rtt_s=SECONDS,
    gbps=RATES.map(lambda rate: 1.0 if rate is None else rate),
)
SOUND = st.builds(
    Device,
    kind=st.sampled_from(["cpu", "cuda"]),
    memory_bytes=st.integers(0, 2 * GB),
    read_gbps=st.one_of(st.none(), st.floats(1e-6, 1e6)),
    gemm_gflops=st.one_of(st.none(), st.floats(1e-6, 1e6)),
)
WISHES = st.builds(
    NodeWish,
    host=HOSTS,
    exclude=st.booleans(),
    memory_bytes=st.one_of(st.none(), st.integers(0, GB)),
    layers=st.one_of(st.none(), st.tuples(st.integers(-1, 7), st.integers(-1, 7))),
)
ASKINGS = st.builds(
    Workload,
    max_context_tokens=st.integers(0, 5000),
    max_concurrency=st.integers(0, 20),
    dtype=st.sampled_from([None, "bf16", "int8", "int4"]),
    num_stages=st.one_of(st.none(), st.integers(0, 8)),
    objective=st.sampled_from(["latency", "throughput", "fit"]),
    separate_experts=st.booleans(),
    nodes=st.lists(WISHES, max_size=2).map(tuple),
)


def planned_or_refused(inventory: Inventory, workload: Workload) -> Plan | None:
    with contextlib.suppress(MagnetarError):
        return plan(*SMALL, inventory, workload)
    return None


def check(found: Plan | None) -> None:
    if found is None:
        return
    ends = [stage.end_layer for stage in found.stages]
    assert [stage.first_layer for stage in found.stages] == [0, *ends[:-1]]
    assert ends[-1] == SMALL[0].n_layers
    assert all(stage.free_bytes >= 0 for stage in found.stages)
    if found.prediction is not None:
        assert 0 < found.prediction.round_trip_s < math.inf


@settings(max_examples=60, deadline=None)
@given(
    nodes=st.lists(NODES, max_size=3).map(tuple),
    links=st.lists(LINKS, max_size=2).map(tuple),
    workload=ASKINGS,
)
def test_any_numbers_at_all_give_a_plan_or_an_error_of_ours(
    nodes: tuple[Node, ...], links: tuple[Link, ...], workload: Workload
) -> None:
    check(planned_or_refused(Inventory(nodes=nodes, links=links), workload))


@settings(max_examples=60, deadline=None)
@given(devices=st.lists(SOUND, min_size=1, max_size=3), workload=ASKINGS)
def test_sound_machines_of_any_size_give_a_plan_or_an_error_of_ours(
    devices: list[Device], workload: Workload
) -> None:
    nodes = tuple(
        dataclasses.replace(A, host=host, devices=(device,))
        for host, device in zip("abc", devices, strict=False)
    )
    check(planned_or_refused(Inventory(nodes=nodes), workload))
