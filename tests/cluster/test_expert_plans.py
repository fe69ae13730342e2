"""Plans whose stages share experts: where they pay, what they hold, what is told of them."""

import itertools
import json

import pytest
import yaml

from magnetar.cluster.footprint import footprint
from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import Plan, Workload, check_experts
from magnetar.cluster.planning.plan_view import plan_json
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.place import MARGIN
from magnetar.tests.cluster.test_expert_cost import BATCH_1_MS, LINKS
from magnetar.tests.planning import GB, MIXTRAL, POPULARITY


def alike(
    count: int, gigabytes: float, read_gbps: float, wire: Link, *, last: float | None = None
) -> Inventory:
    """Nodes that are alike, but perhaps for the last one's bandwidth, behind links that are."""
    hosts = [f"n{number}" for number in range(count)]
    nodes = []
    for host in hosts:
        reads = last if last and host == hosts[-1] else read_gbps
        device = Device(kind="cpu", memory_bytes=int(gigabytes * GB), read_gbps=reads)
        nodes.append(Node(host=host, address="", num_cpus=8, devices=(device,)))
    links = tuple(
        Link(source=a, target=b, rtt_s=0.0, gbps=wire.gbps, overhead_s=wire.overhead_s)
        for a, b in itertools.permutations(hosts, 2)
    )
    return Inventory(nodes=tuple(nodes), links=links)


def planned(inventory: Inventory, **more: object) -> Plan:
    wishes = {
        "max_context_tokens": 1024,
        "max_concurrency": 1,
        "dtype": "bf16",
        "separate_experts": True,
        **more,
    }
    return plan(*MIXTRAL, inventory, Workload(**wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize("read_gbps", [200, 1008])
@pytest.mark.parametrize("name", LINKS)
def test_equal_nodes_share_experts_where_the_table_says_that_it_is_faster(
    read_gbps: int, name: str
) -> None:
    cell = BATCH_1_MS[read_gbps].split()[list(LINKS).index(name)]
    pipeline_ms, parallel_ms = map(float, cell.split("/"))
    found = planned(alike(8, 19, read_gbps, LINKS[name]))
    assert any(stage.helpers for stage in found.stages) == (parallel_ms < pipeline_ms)
    assert found.prediction is not None
    predicted_ms = found.prediction.round_trip_s * 1000
    # Whole milliseconds there, and no head.
    assert predicted_ms == pytest.approx(min(pipeline_ms, parallel_ms), rel=0.03, abs=0.8)


def test_every_byte_of_shared_experts_is_counted_where_it_is() -> None:
    inventory = alike(3, 45, 200, LINKS["10 GbE"])
    found = planned(inventory)
    check_experts(found, 8)
    assert any(stage.helpers for stage in found.stages)
    held = sum(s.weights_bytes + sum(h.weights_bytes for h in s.helpers) for s in found.stages)
    assert held == footprint(*MIXTRAL, "bf16").weights_bytes
    for stage in found.stages:
        free = [stage.free_bytes, *(helper.free_bytes for helper in stage.helpers)]
        assert min(free) >= 45 * GB * MARGIN
    assert found == planned(inventory)
    assert json.loads(json.dumps(plan_json(found)))["pipelines"][0]["num_micro_batches"] == 1


def test_a_slower_host_gets_fewer_experts() -> None:
    found = planned(alike(2, 110, 200, LINKS["10 GbE"], last=150))
    (stage,) = found.stages
    (helper,) = stage.helpers
    assert stage.experts is not None
    own, there = (sum(map(len, experts)) for experts in (stage.experts, helper.experts))
    assert own > there > 0
    assert helper.step_s is not None
    assert helper.hop_s is not None


def test_measured_popularity_decides_which_experts_go_and_copies_the_hot_ones() -> None:
    counts = yaml.safe_load(POPULARITY.read_text(encoding="utf-8"))["domains"]
    rows = counts["high_school_us_history"]
    popularity = tuple(tuple(n / rows["routed_tokens"] for n in row) for row in rows["counts"])
    inventory = alike(2, 60, 200, LINKS["100 GbE"])
    found = planned(inventory, popularity=popularity, max_concurrency=4, objective="throughput")
    (stage,) = found.stages
    (helper,) = stage.helpers
    assert stage.experts is not None
    for layer in range(32):
        loads = [
            sum(popularity[layer][e] for e in set(range(8)) - set(ids[layer]))
            for ids in (stage.experts, helper.experts)
        ]
        assert max(loads) < 1.06
    copies = [n for n in range(32) for e in stage.experts[n] if e in helper.experts[n]]
    assert 31 in copies
    check_experts(found, 8)


def test_what_is_apart_is_never_worse_than_what_is_together() -> None:
    for wire, read in ((LINKS["10 GbE"], 100), (LINKS["1 GbE"], 800)):
        inventory = alike(4, 40, read, wire)
        apart = planned(inventory, objective="throughput", max_concurrency=16)
        together = planned(
            inventory, objective="throughput", max_concurrency=16, separate_experts=False
        )
        assert apart.prediction is not None
        assert together.prediction is not None
        assert apart.prediction.tokens_per_s >= together.prediction.tokens_per_s
