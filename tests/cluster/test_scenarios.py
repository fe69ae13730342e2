"""Clusters that people have, as inventory files: the shape of each plan, or what is enough."""

from pathlib import Path

import pytest

from magnetar.cluster.plan import ComputeDtype, Objective, Plan, Workload
from magnetar.cluster.planning.planner import plan
from magnetar.errors import InfeasiblePlanError
from magnetar.manifests.inventory import load_inventory
from magnetar.tests.planning import MIXTRAL, SMALL

SCENARIOS = Path(__file__).parent.parent / "scenarios"


def planned(
    scenario: str,
    *,
    dtype: ComputeDtype = "bf16",
    objective: Objective = "latency",
    small: bool = False,
) -> Plan:
    inventory = load_inventory(SCENARIOS / f"{scenario}.yaml", environment={})
    workload = Workload(
        max_context_tokens=4096, max_concurrency=8, dtype=dtype, objective=objective
    )
    return plan(*(SMALL if small else MIXTRAL), inventory, workload)


def shape(found: Plan) -> list[tuple[str, str, int]]:
    """Node, device and number of layers of every stage, in order."""
    return [(s.host, s.device, s.end_layer - s.first_layer) for s in found.stages]


def test_three_cards_of_40_gb_share_the_layers_evenly() -> None:
    found = planned("three-cards-of-40-gb", objective="throughput")
    assert sorted(count for _, _, count in shape(found)) == [10, 11, 11]
    assert {device for _, device, _ in shape(found)} == {"cuda:0", "cuda:1", "cuda:2"}


def test_a_card_beside_a_large_host_is_filled_and_the_host_takes_the_rest() -> None:
    with pytest.raises(InfeasiblePlanError, match="is enough: --dtype int8"):
        planned("one-card-beside-a-large-host")
    found = planned("one-card-beside-a-large-host", dtype="int8")
    by_device = {device: count for _, device, count in shape(found)}
    assert by_device["cpu"] > by_device["cuda:0"] >= 8
    assert found.prediction is not None
    assert found.stages[found.prediction.bottleneck].device == "cpu"


def test_eight_small_cards_are_all_used_for_throughput_and_few_for_one_stream() -> None:
    with pytest.raises(InfeasiblePlanError, match="is enough: --dtype int8"):
        planned("eight-of-16-gb-over-1-gbe")
    together = planned("eight-of-16-gb-over-1-gbe", dtype="int8", objective="throughput")
    assert [count for _, _, count in shape(together)] == [4] * 8
    alone = planned("eight-of-16-gb-over-1-gbe", dtype="int8")
    assert len(alone.stages) == 6
    assert {idle.host for idle in alone.unused} == {"t4-6", "t4-7"}


def test_the_slow_host_gets_what_the_macs_cannot_hold() -> None:
    found = planned("macs-and-linux-over-wi-fi")
    by_host = {host: count for host, _, count in shape(found)}
    assert by_host["linux"] == 32 - by_host["studio"] - by_host["book"]
    assert by_host["studio"] >= 12
    assert by_host["book"] >= 7
    # Halved in size, the model fits on the two Macs, and the slow host is left out.
    smaller = planned("macs-and-linux-over-wi-fi", dtype="int8")
    assert "linux" not in {host for host, _, _ in shape(smaller)}
    assert {idle.host for idle in smaller.unused} >= {"linux"}


def test_two_continents_share_only_what_one_cannot_hold() -> None:
    found = planned("two-continents")
    assert len(found.stages) == 2
    assert found.prediction is not None
    assert found.prediction.round_trip_s > 0.14  # the ocean is crossed twice for every token
    assert len(planned("two-continents", dtype="int8").stages) == 1
    (idle,) = planned("two-continents", dtype="int8").unused
    assert "with it a token takes" in idle.reason


def test_weak_devices_of_a_home_are_left_out_for_a_small_model() -> None:
    found = planned("home-cluster", small=True)
    assert shape(found) == [("desktop", "cuda:0", 6)]
    assert {idle.host for idle in found.unused} == {"m1", "laptop", "phone"}


def test_a_home_that_is_too_small_is_told_how_much_memory_is_missing() -> None:
    with pytest.raises(InfeasiblePlanError, match=r"GB more on every device"):
        planned("home-cluster", dtype="int4")
