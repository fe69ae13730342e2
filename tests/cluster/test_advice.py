"""An infeasible request is told what would be enough, and that is both enough and least."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.machines import Device, Inventory, Node
from magnetar.cluster.plan import NodeWish, Workload
from magnetar.cluster.planning.advice import least, sufficient_changes
from magnetar.cluster.planning.explanation import explained
from magnetar.cluster.planning.node_wishes import without_limits
from magnetar.cluster.planning.planner import can_plan, plan
from magnetar.errors import InfeasiblePlanError
from magnetar.settings import KV_BLOCK_TOKENS
from magnetar.tests.planning import GB, MIXTRAL, SMALL, model


def cluster(*gigabytes: float) -> Inventory:
    return Inventory(
        nodes=tuple(
            Node(
                host=f"n{number}",
                address="",
                num_cpus=8,
                devices=(Device(kind="cpu", memory_bytes=int(size * GB)),),
            )
            for number, size in enumerate(gigabytes)
        )
    )


def timed(inventory: Inventory) -> Inventory:
    """With speeds, so that the search plans."""
    return Inventory(
        nodes=tuple(
            dataclasses.replace(
                node,
                devices=tuple(dataclasses.replace(d, read_gbps=100.0) for d in node.devices),
            )
            for node in inventory.nodes
        )
    )


def asked(context: int, concurrency: int) -> Workload:
    return Workload(max_context_tokens=context, max_concurrency=concurrency, dtype="bf16")


def grown(inventory: Inventory, host: str | None, more: int) -> Inventory:
    def device(node: Node) -> Node:
        (old,) = node.devices
        new = dataclasses.replace(old, memory_bytes=old.memory_bytes + more)
        return dataclasses.replace(node, devices=(new,))

    nodes = (device(n) if host in (None, n.host) else n for n in inventory.nodes)
    return Inventory(nodes=tuple(nodes))


def test_bisection_finds_the_border_and_says_when_there_is_none() -> None:
    assert least(lambda n: n >= 17, 100) == 17
    assert least(lambda n: n > 100, 100) is None
    assert least(lambda _: True, 0) is None


def test_every_change_is_enough_by_itself() -> None:
    inventory, workload = cluster(80, 48), asked(32768, 8)
    with pytest.raises(InfeasiblePlanError, match="any one of these is enough"):
        plan(*MIXTRAL, inventory, workload)
    changes = {c.knob: c for c in sufficient_changes(*MIXTRAL, inventory, workload, "bf16")}
    assert {"context", "concurrency", "memory", "memory everywhere"} <= set(changes)
    context, concurrency = changes["context"].amount, changes["concurrency"].amount
    plan(*MIXTRAL, inventory, dataclasses.replace(workload, max_context_tokens=context))
    plan(*MIXTRAL, inventory, dataclasses.replace(workload, max_concurrency=concurrency))
    host = changes["memory"].text.rpartition(" on ")[2].partition(" ")[0]
    plan(*MIXTRAL, grown(inventory, host, changes["memory"].amount), workload)
    plan(*MIXTRAL, grown(inventory, None, changes["memory everywhere"].amount), workload)


def test_a_smaller_dtype_is_offered_where_it_is_enough() -> None:
    changes = sufficient_changes(*MIXTRAL, cluster(70), asked(4096, 1), "bf16")
    assert changes[0].text == "--dtype int8"
    changes = sufficient_changes(*MIXTRAL, cluster(46), asked(4096, 1), "bf16")
    assert changes[0].text == "--dtype int4"


def test_context_and_concurrency_are_given_up_no_further_than_needed() -> None:
    inventory, workload = cluster(80, 48), asked(32768, 8)
    changes = {c.knob: c.amount for c in sufficient_changes(*MIXTRAL, inventory, workload, "bf16")}
    context = changes["context"] + 8 * KV_BLOCK_TOKENS
    concurrency = changes["concurrency"] + 1
    for wishes in (
        dataclasses.replace(workload, max_context_tokens=context),
        dataclasses.replace(workload, max_concurrency=concurrency),
    ):
        with pytest.raises(InfeasiblePlanError):
            plan(*MIXTRAL, inventory, wishes)


@settings(max_examples=30, deadline=None)
@given(
    memories=st.lists(st.integers(300, 900), min_size=1, max_size=4),
    context=st.integers(64, 8192),
    concurrency=st.integers(1, 16),
)
def test_what_is_said_to_be_enough_is_enough(
    memories: list[int], context: int, concurrency: int
) -> None:
    inventory = cluster(*(size / 1000 for size in memories))
    workload = asked(context, concurrency)
    try:
        plan(*SMALL, inventory, workload)
    except InfeasiblePlanError:
        pass
    else:
        return
    for change in sufficient_changes(*SMALL, inventory, workload, "bf16"):
        wishes, machines = workload, inventory
        if change.knob == "context":
            wishes = dataclasses.replace(workload, max_context_tokens=change.amount)
        elif change.knob == "concurrency":
            wishes = dataclasses.replace(workload, max_concurrency=change.amount)
        elif change.knob == "dtype":
            wishes = dataclasses.replace(workload, dtype=change.text.split()[-1])  # type: ignore[arg-type]
        elif change.knob == "memory everywhere":
            machines = grown(inventory, None, change.amount)
        else:
            host = change.text.rpartition(" on ")[2].partition(" ")[0]
            machines = grown(inventory, host, change.amount)
        plan(*SMALL, machines, wishes)


def test_advice_keeps_to_nodes_that_may_be_used_and_to_pins() -> None:
    inventory = cluster(50, 20, 60)
    open_to_all = dataclasses.replace(asked(4096, 8), dtype=None)
    for wishes in (
        (NodeWish(host="n2", exclude=True),),
        (NodeWish(host="n2", layers=(0, 8)),),
        (NodeWish(host="n0", memory_bytes=50 * GB), NodeWish(host="n2", memory_bytes=10 * GB)),
    ):
        workload = dataclasses.replace(open_to_all, nodes=wishes)
        fast = timed(inventory)
        found = plan(*MIXTRAL, fast, workload)
        assert found.concessions
        told = explained(*MIXTRAL, fast, workload, found).improvements
        enough = [each for each in told if " more on " in each.change]
        assert enough
        free, pinned = without_limits(MIXTRAL[0], fast, workload)
        for each in enough:
            size, _, where = each.change.partition(" GB more on ")
            host = where.partition(" (")[0] if where != "every device" else None
            more = int((float(size) + 0.05) * GB)
            assert can_plan(*MIXTRAL, grown(free, host, more), pinned)
            assert not can_plan(*MIXTRAL, grown(free, host, more * 3 // 4), pinned)


def test_pins_without_a_placement_are_told_what_is_enough() -> None:
    inventory = timed(cluster(60, 150))
    workload = dataclasses.replace(asked(512, 2), nodes=(NodeWish(host="n0", layers=(0, 30)),))
    with pytest.raises(InfeasiblePlanError, match="pins leave no placement") as refused:
        plan(*MIXTRAL, inventory, workload)
    changes = {each["knob"]: each for each in refused.value.changes}
    assert changes["memory"]["text"] in str(refused.value)
    assert changes["memory"]["host"] == "n0"
    plan(*MIXTRAL, grown(inventory, "n0", changes["memory"]["amount"]), workload)
    assert changes["dtype"]["text"] == "--dtype int8"
    plan(*MIXTRAL, inventory, dataclasses.replace(workload, dtype="int8"))


def test_a_context_may_shrink_where_whole_layers_fit_at_no_length() -> None:
    devices = (0.848663751,), (0.581474657, 0.593594225)
    nodes = tuple(
        Node(
            host=f"n{number}",
            address="",
            num_cpus=8,
            devices=tuple(
                Device(kind="cuda", index=at, memory_bytes=int(size * GB), read_gbps=300.0)
                for at, size in enumerate(sizes)
            ),
        )
        for number, sizes in enumerate(devices)
    )
    least = Workload(
        max_context_tokens=1024,
        max_concurrency=8,
        dtype="int4",
        num_stages=2,
        separate_experts=True,
    )
    machines = Inventory(nodes=nodes)
    lean = model(n_layers=8, dim=1024, num_experts=4)
    assert plan(*lean, machines, least).max_context_tokens == 1024
    longer = dataclasses.replace(least, max_context_tokens=8192, min_context_tokens=1024)
    assert plan(*lean, machines, longer).max_context_tokens >= 1024


def changed(
    inventory: Inventory, workload: Workload, change: Mapping[str, Any]
) -> tuple[Inventory, Workload]:
    """The request with one of the changes that a refusal tells."""
    amount = change["amount"]
    if change["knob"] in ("memory", "memory everywhere"):
        return grown(inventory, change["host"], amount), workload
    wish = {
        "dtype": {"dtype": change["text"].split()[-1]},
        "context": {"max_context_tokens": amount},
        "concurrency": {"max_concurrency": amount},
        "pipelines": {"num_pipelines": amount},
    }[change["knob"]]
    return inventory, dataclasses.replace(workload, **wish)


@settings(max_examples=20, deadline=None)
@given(
    memories=st.lists(st.integers(560, 800), min_size=2, max_size=3),
    concurrency=st.integers(2, 16),
    pin=st.sampled_from([None, (0, 3), (2, 6)]),
    separate=st.booleans(),
    num_pipelines=st.sampled_from([None, 2]),
)
def test_what_is_enough_holds_for_throughput_and_a_little_less_memory_does_not(
    memories: list[int],
    concurrency: int,
    pin: tuple[int, int] | None,
    separate: bool,
    num_pipelines: int | None,
) -> None:
    inventory = timed(cluster(*(size / 1000 for size in memories)))
    workload = dataclasses.replace(
        asked(8192, concurrency),
        objective="throughput",
        separate_experts=separate,
        num_pipelines=num_pipelines,
        nodes=() if pin is None else (NodeWish(host="n1", layers=pin),),
    )
    try:
        plan(*SMALL, inventory, workload)
    except InfeasiblePlanError as refused:
        changes = refused.changes
    else:
        return
    for change in changes:
        plan(*SMALL, *changed(inventory, workload, change))
        # Several pipelines are asked for with even shares of the streams, and planned with any.
        if change["knob"].startswith("memory") and num_pipelines is None:
            # It is told in tenths of a GB.
            less = change["amount"] - max(GB // 10, change["amount"] // 8)
            with pytest.raises(InfeasiblePlanError):
                plan(*SMALL, *changed(inventory, workload, {**change, "amount": less}))
