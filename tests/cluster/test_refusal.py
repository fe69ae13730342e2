"""Requests that no plan meets: one sentence, short lines, and changes that are enough."""

from dataclasses import replace

import pytest

from magnetar.cluster.deployment.status import Failure
from magnetar.cluster.machines import ComputeDtype, Device, Inventory, Node
from magnetar.cluster.plan import Workload
from magnetar.cluster.planning.planner import plan
from magnetar.errors import InfeasiblePlanError
from magnetar.tests.planning import GB, MIXTRAL


def node(host: str, gigabytes: int) -> Node:
    memory = Device(kind="cpu", memory_bytes=gigabytes * GB)
    return Node(host=host, address="", num_cpus=8, devices=(memory,))


def refusal(
    nodes: list[Node], context: int, concurrency: int, dtype: ComputeDtype | None = None
) -> InfeasiblePlanError:
    workload = Workload(max_context_tokens=context, max_concurrency=concurrency, dtype=dtype)
    with pytest.raises(InfeasiblePlanError) as caught:
        plan(*MIXTRAL, Inventory(nodes=tuple(nodes)), workload)
    return caught.value


def test_where_no_dtype_was_asked_for_what_is_missing_is_that_of_the_narrowest() -> None:
    nodes = [node("alpha", 16), node("beta", 8)]
    refused = refusal(nodes, 4096, 1)
    assert "of int4 weights (93.4 GB as they are stored, in bf16)" in str(refused)
    (more,) = (each for each in refused.changes if each["knob"] == "memory")
    assert more["amount"] < 40 * GB
    # About as much would be enough on either: the larger one is named.
    assert (more["host"], more["device"]) == ("alpha", "cpu")
    assert more["text"].endswith(" on alpha (cpu)")
    device = replace(nodes[0].devices[0], memory_bytes=16 * GB + more["amount"])
    grown = Inventory(nodes=(replace(nodes[0], devices=(device,)), nodes[1]))
    found = plan(*MIXTRAL, grown, Workload(max_context_tokens=4096, max_concurrency=1))
    assert {stage.dtype for stage in found.stages} == {"int4"}


def test_it_is_one_sentence_and_lines_that_fit_a_terminal() -> None:
    nodes = [node(f"some-node-{number}", 8 + number % 3) for number in range(12)]
    refused = refusal(nodes, 32768, 8, "bf16")
    first, *rest = str(refused).splitlines()
    assert all(len(line) <= 80 for line in (f"magnetar: {first}", *rest))
    assert all(line.startswith("  ") for line in rest)
    (alike,) = (line for line in rest if line.startswith("    9.0 GB of 10.0 GB cpu each: "))
    assert alike.endswith("some-node-11, some-node-2 and 2 more")
    told = [each["text"] for each in refused.changes]
    assert [line.strip() for line in rest[-len(told) :]] == told


def test_programs_are_told_the_changes_from_another_process_too() -> None:
    refused = refusal([node("alpha", 16)], 4096, 1, "bf16")
    again = Failure.of(refused).to_error()
    assert (type(again), str(again)) == (InfeasiblePlanError, str(refused))
    assert again.fields() == refused.fields()
    assert [each["knob"] for each in refused.changes] == ["memory"]
