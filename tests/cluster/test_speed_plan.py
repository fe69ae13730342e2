"""Plans where speeds are known: the fast are used, the slow are left out, and it says why."""

import dataclasses
import json

import pytest

from magnetar.cluster.footprint import footprint
from magnetar.cluster.inventory.profiles import profiles
from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import Plan, Workload
from magnetar.cluster.planning.plan_picture import plan_svg
from magnetar.cluster.planning.plan_view import plan_json, plan_table
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.planning.unused_hosts import MAX_EXPLAINED
from magnetar.cluster.units import milliseconds
from magnetar.tests.planning import GB, MIXTRAL, SMALL


def node(host: str, gigabytes: float, read_gbps: float | None, **more: float) -> Node:
    device = Device(kind="cpu", memory_bytes=int(gigabytes * GB), read_gbps=read_gbps, **more)  # type: ignore[arg-type]
    return Node(host=host, address="", num_cpus=8, devices=(device,))


def linked(*nodes: Node, rtt_s: float = 0.3e-3, gbps: float = 0.117) -> Inventory:
    hosts = [each.host for each in nodes]
    links = [
        Link(source=a, target=b, rtt_s=rtt_s, gbps=gbps) for a in hosts for b in hosts if a != b
    ]
    return Inventory(nodes=nodes, links=tuple(links))


def asked(**more: object) -> Workload:
    return Workload(**{"max_context_tokens": 2048, "max_concurrency": 8, **more})  # type: ignore[arg-type]


def layers(found: Plan) -> dict[str, int]:
    return {stage.host: stage.end_layer - stage.first_layer for stage in found.stages}


def test_without_speeds_the_plan_is_that_of_memory_alone() -> None:
    known = linked(node("big", 80, 50), node("quick", 64, 900), node("z", 30, 20))
    unknown = Inventory(
        nodes=tuple(
            dataclasses.replace(
                each, devices=tuple(dataclasses.replace(d, read_gbps=None) for d in each.devices)
            )
            for each in known.nodes
        )
    )
    by_bytes = plan(*MIXTRAL, unknown, asked())
    # For `fit` memory alone decides, too; what is known of speeds is told.
    fitted = plan(*MIXTRAL, known, asked(objective="fit"))
    assert fitted.prediction is not None
    assert [(s.host, s.first_layer, s.free_bytes) for s in fitted.stages] == [
        (s.host, s.first_layer, s.free_bytes) for s in by_bytes.stages
    ]
    # One node without a speed is enough: a guess would be worse than none.
    partly = Inventory(nodes=(*known.nodes[:2], unknown.nodes[2]), links=known.links)
    assert plan(*MIXTRAL, partly, asked()) == by_bytes
    assert by_bytes.prediction is None
    assert {stage.step_s for stage in by_bytes.stages} == {None}


def test_one_stream_stays_on_the_fastest_node_that_holds_the_model() -> None:
    found = plan(*MIXTRAL, linked(node("big", 200, 50), node("quick", 140, 300)), asked())
    assert layers(found) == {"quick": 32}
    (idle,) = found.unused
    assert idle.host == "big"
    assert "tried with it, a token takes" in idle.reason


def test_throughput_spreads_over_nodes_in_proportion_to_speed() -> None:
    # Bound by operations: what is read is read for all, and half of the streams read as much.
    strong, weak = node("a", 200, 300, gemm_gflops=1500), node("b", 200, 200, gemm_gflops=1000)
    nodes = linked(strong, weak, gbps=1.25)
    found = plan(
        *MIXTRAL, nodes, asked(objective="throughput", max_concurrency=64, num_pipelines=1)
    )
    assert set(layers(found)) == {"a", "b"}
    assert 18 <= layers(found)["a"] <= 20


def test_a_slow_link_moves_the_work_to_one_node() -> None:
    def stages_behind(rtt_s: float, gbps: float) -> int:
        a, b = (node(name, 140, 300, gemm_gflops=1500) for name in "ab")
        nodes = linked(a, b, rtt_s=rtt_s, gbps=gbps)
        wishes = asked(objective="throughput", max_concurrency=32, num_pipelines=1)
        found = plan(*MIXTRAL, nodes, wishes)
        return len(found.stages)

    assert stages_behind(0.1e-3, 1.25) == 2
    assert stages_behind(2.0, 1.25) == 1
    assert stages_behind(0.1e-3, 1e-5) == 1


def test_a_weak_device_is_left_out_though_it_has_room() -> None:
    # The shape of a published home cluster: a small model belongs on one machine, not on four.
    home = linked(
        node("m1", 24, 55), node("laptop", 41, 300), node("desktop", 97, 460), node("phone", 19, 20)
    )
    found = plan(*SMALL, home, asked(max_concurrency=1))
    assert set(layers(found)) == {"desktop"}
    assert {idle.host for idle in found.unused} == {"m1", "laptop", "phone"}


def test_half_the_bandwidth_gets_fewer_layers() -> None:
    nodes = linked(node("a", 80, 400), node("b", 80, 200), gbps=12.5)
    found = plan(*MIXTRAL, nodes, asked(objective="throughput", max_concurrency=32))
    assert layers(found)["a"] > layers(found)["b"]


def test_the_node_whose_memory_is_too_small_is_said_to_be() -> None:
    found = plan(*MIXTRAL, linked(node("a", 200, 300), node("pi", 1, 5)), asked())
    (idle,) = found.unused
    assert "too small" in idle.reason


def test_predicts_what_the_roofline_says() -> None:
    found = plan(*MIXTRAL, linked(node("a", 200, 100)), asked())
    assert found.prediction is not None
    # Per token: attention of 32 layers, two experts each, the head, and half a context of keys.
    expert = 3 * 4096 * 14336 * 2
    attention = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096)
    read = 32 * (attention + 2 * expert + 1024 * 4096) + 2 * 4096 * 32001
    assert found.prediction.round_trip_s == pytest.approx(read / 100e9, rel=0.01)
    assert found.pipelines[0].bottleneck == 0
    assert found.stages[0].step_s == pytest.approx(found.prediction.round_trip_s, rel=0.01)
    text = plan_table(found)
    assert "tokens/s" in text
    assert "predicted for latency" in text


def test_a_number_of_stages_that_is_asked_for_is_kept() -> None:
    nodes = linked(node("a", 200, 300), node("b", 200, 100))
    assert len(plan(*MIXTRAL, nodes, asked(num_stages=2)).stages) == 2
    four = plan(*MIXTRAL, nodes, asked(num_stages=4))
    assert len(four.stages) == 4
    assert four.prediction is not None


def test_links_that_nobody_measured_are_said_to_be_assumed() -> None:
    nodes = Inventory(nodes=(node("a", 64, 300), node("b", 64, 300)))
    found = plan(*MIXTRAL, nodes, asked())
    assert found.prediction is not None
    (told,) = (said for said in found.prediction.assumed if "1 GbE" in said)
    assert told.endswith("no link was measured: a to b")  # and no second time for the way back
    shown = [plan_table(found), json.dumps(plan_json(found))]
    shown.append(plan_svg(found, num_experts=8))
    assert all("no link was measured: a to b" in " ".join(view.split()) for view in shown)


def test_links_to_helpers_that_nobody_measured_are_said_to_be_assumed() -> None:
    slow = Inventory(nodes=tuple(node(f"n{number}", 30, 20) for number in range(4)))
    found = plan(*MIXTRAL, slow, asked(dtype="bf16", separate_experts=True))
    hosts = [(stage.host, helper.host) for stage in found.stages for helper in stage.helpers]
    assert hosts
    assert found.prediction is not None
    (told,) = (said for said in found.prediction.assumed if "1 GbE" in said)
    assert all(f"{home} to {helper}" in told for home, helper in hosts)


def test_a_node_that_was_busy_when_it_was_measured_is_told_with_the_plan() -> None:
    nodes = linked(dataclasses.replace(node("a", 200, 300), busy_share=0.4), node("b", 10, 20))
    found = plan(*MIXTRAL, nodes, asked())
    assert found.prediction is not None
    assert any("a is as fast as it was measured, beside" in s for s in found.prediction.assumed)


def test_figures_of_a_profile_are_said_to_be_assumed() -> None:
    cards = [
        Node(host=f"h{number}", address="", num_cpus=8, devices=(profiles()[name].device,))
        for number, name in enumerate(("a100-80", "a100-80", "a100-40"))
    ]
    found = plan(*MIXTRAL, linked(*cards), asked(dtype="bf16"))
    assert found.prediction is not None
    used = {card.devices[0].assumed for card in cards if card.host in found.hosts}
    assert used <= set(found.prediction.assumed)
    told = "a100-80 is as fast as its data sheet, derated; 0.3 ms for a layer"
    assert any(said.startswith(told) and "from 50 to 930 us" in said for said in used)


def test_every_byte_fits_where_the_search_places_it() -> None:
    nodes = linked(*(node(name, 32 + 4 * n, 100 + 90 * n) for n, name in enumerate("abcd")))
    for objective in ("latency", "throughput"):
        found = plan(*MIXTRAL, nodes, asked(objective=objective))
        for stage in found.stages:
            device = next(n for n in nodes.nodes if n.host == stage.host).devices[0]
            assert stage.free_bytes >= 0.1 * device.memory_bytes - 1
        total = sum(stage.weights_bytes for stage in found.stages)
        assert total == footprint(*MIXTRAL, "bf16").weights_bytes


def test_overheads_of_layers_and_steps_add_to_the_time_of_a_step() -> None:
    (plain,) = (node("a", 200, 100),)
    slow = dataclasses.replace(
        plain,
        devices=(
            dataclasses.replace(plain.devices[0], layer_overhead_s=0.001, step_overhead_s=0.01),
        ),
    )
    trips = []
    for each in (plain, slow):
        found = plan(*MIXTRAL, Inventory(nodes=(each,)), Workload(max_context_tokens=512))
        assert found.prediction is not None
        trips.append(found.prediction.round_trip_s)
    assert trips[1] - trips[0] == pytest.approx(32 * 0.001 + 0.01)


def test_stages_of_one_device_take_the_whole_batch_in_turn() -> None:
    for num_stages in (1, 2, 4):
        found = plan(*MIXTRAL, linked(node("a", 200, 100)), asked(num_stages=num_stages))
        assert len(found.stages) == num_stages
        assert found.pipelines[0].steps_at_once == 1


def test_steps_are_small_where_prompts_would_hold_up_the_others() -> None:
    def steps(gemm_gflops: float, objective: str) -> int | None:
        nodes = (node(name, 50, 200, gemm_gflops=gemm_gflops) for name in "abc")
        found = plan(*MIXTRAL, linked(*nodes), asked(dtype="bf16", objective=objective))
        assert found.prediction is not None
        (pipeline,) = found.pipelines
        assert len(pipeline.stages) > 1
        told = f"steps have at most {pipeline.max_step_tokens} tokens"
        assert (told in " ".join(plan_table(found).split())) == (pipeline.max_step_tokens == 16)
        return pipeline.max_step_tokens

    assert steps(500, "throughput") == 16
    assert steps(1e6, "throughput") == 512
    assert steps(500, "latency") is None


def test_what_an_unused_node_would_do_is_the_best_of_several_places_for_it() -> None:
    # Beside the fast node it would wait for the slow link; by itself it does not.
    fast, slow = node("fast", 140, 400), node("slow", 140, 100)
    nodes = linked(fast, slow, rtt_s=0.5, gbps=0.01)
    alone = plan(*MIXTRAL, linked(slow), asked())
    (idle,) = plan(*MIXTRAL, nodes, asked()).unused
    assert alone.prediction is not None
    assert milliseconds(alone.prediction.round_trip_s) in idle.reason


def test_devices_that_are_alike_are_told_the_same_whatever_their_nodes_do() -> None:
    card = Device(kind="cuda", memory_bytes=12 * GB, read_gbps=700)
    slow = Device(kind="cpu", memory_bytes=12 * GB, read_gbps=20)
    names = [f"n{number:02}" for number in range(12)]
    nodes = [Node(host=name, address="", num_cpus=8, devices=(card, slow)) for name in names]
    found = plan(*MIXTRAL, Inventory(nodes=tuple(nodes)), asked(max_concurrency=1))
    idle = [each for each in found.unused if each.device == "cpu"]
    assert len(idle) > MAX_EXPLAINED
    assert len({each.reason for each in idle}) == 1
