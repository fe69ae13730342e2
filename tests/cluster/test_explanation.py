"""What is said of a plan: true amounts, changes that keep their promise, and lines that fit."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import ExpertHost, Objective, Plan, StagePlan, Workload
from magnetar.cluster.planning.explanation import Explanation, explained
from magnetar.cluster.planning.plan_picture import plan_svg
from magnetar.cluster.planning.plan_view import plan_json, plan_table
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.place import places_of
from magnetar.cluster.units import id_ranges, names_text, wrapped
from magnetar.manifests.inventory import load_inventory
from magnetar.tests.planning import GB, MIXTRAL

SCENARIOS = Path(__file__).parent.parent / "scenarios"
PLANNED = sorted(file for file in SCENARIOS.glob("*.yaml") if file.stem != "home-cluster")
"""But the one that is too small for the model in every dtype."""


def node(host: str, gigabytes: float, gbps: float, held: float = 0) -> Node:
    device = Device(kind="cpu", memory_bytes=int(gigabytes * GB), read_gbps=gbps)
    return Node(host=host, address="", num_cpus=8, devices=(device,), held_bytes=int(held * GB))


def asked(objective: Objective = "latency") -> Workload:
    return Workload(max_context_tokens=4096, max_concurrency=4, objective=objective)


def both(inventory: Inventory, workload: Workload) -> tuple[Plan, Explanation]:
    found = plan(*MIXTRAL, inventory, workload)
    return found, explained(*MIXTRAL, inventory, workload, found)


def test_what_is_to_fetch_is_what_a_node_needs_and_does_not_have() -> None:
    nodes = (node("a", 70, 100, held=30), node("b", 70, 100))
    found, said = both(Inventory(nodes=nodes), asked())
    by_host = {each.host: each for each in said.fetches}
    assert set(by_host) == {"a", "b"}
    whole = sum(entry.num_bytes for entry in MIXTRAL[1])
    assert sum(each.needed_bytes for each in said.fetches) == whole
    assert by_host["a"].missing_bytes == by_host["a"].needed_bytes - 30 * GB
    assert by_host["b"].missing_bytes == by_host["b"].needed_bytes
    text = plan_table(found, said)
    missing = sum(each.missing_bytes for each in said.fetches)
    assert f"to fetch: {missing / 1e9:.1f} GB in all: " in text
    assert f"b {by_host['b'].missing_bytes / 1e9:.1f} GB" in text
    everything = replace(nodes[0], held_bytes=100 * GB)
    _, said = both(Inventory(nodes=(everything, nodes[1])), asked())
    assert {each.host: each.missing_bytes for each in said.fetches}["a"] == 0


def test_memory_that_makes_a_concession_needless_is_named_and_is_enough() -> None:
    inventory = Inventory(nodes=(node("a", 80, 100),))
    found, said = both(inventory, asked())
    assert [each.knob for each in found.concessions] == ["dtype"]
    (more,) = [each for each in said.improvements if each.change.endswith("more on a (cpu)")]
    grown = 80 + float(more.change.split()[0])
    assert not plan(*MIXTRAL, Inventory(nodes=(node("a", grown + 0.1, 100),)), asked()).concessions


@pytest.mark.parametrize("gigabytes", [70, 110])
def test_asking_for_less_that_makes_a_concession_needless_is_told_before_memory(
    gigabytes: int,
) -> None:
    inventory = Inventory(nodes=(node("a", gigabytes, 100),))
    wishes = replace(asked(), max_context_tokens=32768, max_concurrency=64)
    wishes = replace(wishes, min_context_tokens=512, dtype="bf16" if gigabytes > 105 else "int8")
    found, said = both(inventory, wishes)
    assert [each.knob for each in found.concessions] == ["context"]
    whole = [each.change for each in said.improvements if each.effect == "the whole context"]
    fewer, more = whole
    assert more.endswith("more on a (cpu)")
    option, count = fewer.split()
    assert option == "--max-concurrency"
    for less, is_enough in ((0, True), (1, False)):
        wanted = replace(wishes, max_concurrency=int(count) + less)
        assert (not plan(*MIXTRAL, inventory, wanted).concessions) is is_enough


def test_a_narrower_dtype_keeps_its_promise() -> None:
    inventory = Inventory(nodes=(node("a", 120, 100),))
    found, said = both(inventory, asked())
    (narrow,) = [each for each in said.improvements if each.change == "--dtype int8"]
    then = plan(*MIXTRAL, inventory, replace(asked(), dtype="int8"))
    assert then.prediction is not None
    assert narrow.effect.startswith(f"{then.prediction.stream_tokens_per_s:.1f} tokens/s")
    assert found.prediction is not None
    assert then.prediction.stream_tokens_per_s > 1.5 * found.prediction.stream_tokens_per_s


@pytest.mark.parametrize(("gbps", "is_told"), [(0.004, True), (12.0, False)])
def test_a_faster_link_is_proposed_where_the_link_is_what_binds(gbps: float, is_told: bool) -> None:
    nodes = (node("a", 70, 1000), node("b", 70, 1000))
    links = (Link(source="a", target="b", rtt_s=0.004, gbps=gbps),)
    _, said = both(Inventory(nodes=nodes, links=links), asked())
    proposed = [each for each in said.improvements if "10 Gbit/s between a and b" in each.change]
    assert bool(proposed) == is_told


def test_a_slow_device_is_named_with_what_a_fast_one_would_do() -> None:
    nodes = (node("quick", 70, 400), node("slow", 70, 40))
    _, said = both(Inventory(nodes=nodes), asked("throughput"))
    assert any(each.change.startswith("slow cpu as fast as") for each in said.improvements)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.stem)
def test_no_line_is_wider_than_the_terminal(file: Path, objective: Objective, width: int) -> None:
    inventory = load_inventory(file, environment={})
    found, said = both(inventory, replace(asked(objective), separate_experts=True, dtype="int8"))
    lines = plan_table(found, said, width=width).splitlines()
    assert max(map(len, lines)) <= width
    for stage in found.stages:
        assert any(line.startswith(f"{stage.index} ") for line in lines)
        for helper in stage.helpers:
            assert any(line.startswith("   ") and helper.host in line for line in lines)


def test_helpers_have_rows_with_their_experts_and_json_has_all_of_it() -> None:
    inventory = load_inventory(SCENARIOS / "one-card-beside-a-large-host.yaml", environment={})
    found, said = both(inventory, replace(asked(), separate_experts=True, dtype="int8"))
    (stage,) = found.stages
    (helper,) = stage.helpers
    rows = plan_table(found, said).splitlines()
    assert helper.device in rows[2]
    assert "a layer" in rows[2]
    document = plan_json(found, said)
    assert document["fetches"][0]["missing_bytes"] > 0
    assert {"change", "effect"} == set(document["improvements"][0])


def test_nodes_unused_for_one_reason_share_a_line() -> None:
    inventory = Inventory(nodes=(node("big", 200, 100), node("p0", 1, 5), node("p1", 1, 5)))
    text = plan_table(plan(*MIXTRAL, inventory, asked()))
    assert "unused: p0, p1: too small" in text


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["t4-10", "t4-8", "t4-9", "t4-1"], "t4-1, t4-8 to t4-10"),
        (["b", "a"], "a, b"),
        (["n1", "n0"], "n0, n1"),
        (["box cuda:1", "box cuda:2", "box cuda:3"], "box cuda:1 to box cuda:3"),
        (["a-10 cpu", "a-8 cpu", "b cpu", "a-9 cpu"], "a-8 to a-10 cpu, b cpu"),
        (["a0 cuda:0", "a1 cuda:0", "a0 cuda:1"], "a0 cuda:0, a0 cuda:1, a1 cuda:0"),
        (["x07", "x08", "x09"], "x07, x08, x09"),
        (["1", "2", "3", ""], ", 1 to 3"),
        ([], ""),
    ],
)
def test_many_names_that_are_numbered_are_told_as_ranges(names: list[str], text: str) -> None:
    assert names_text(names) == text


def test_amounts_stay_beside_their_units() -> None:
    assert wrapped("a first token after 1.28 s or so", 24) == [
        "a first token after",
        "  1.28 s or so",
    ]
    assert wrapped("short", 80) == ["short"]
    assert wrapped("as long as it is", None) == ["as long as it is"]
    assert id_ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


@pytest.mark.parametrize("objective", ["latency", "throughput", "fit"])
@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.stem)
def test_the_memory_of_every_device_is_accounted_for(file: Path, objective: Objective) -> None:
    inventory = load_inventory(file, environment={})
    found = plan(*MIXTRAL, inventory, replace(asked(objective), separate_experts=True))
    taken: Counter[tuple[str, str]] = Counter()
    free: dict[tuple[str, str], int] = {}
    for stage in found.stages:
        members: list[StagePlan | ExpertHost] = [stage, *stage.helpers]
        for member in members:
            seat = (member.host, member.device)
            taken[seat] += member.weights_bytes + member.workspace_bytes
            free[seat] = member.free_bytes
        taken[stage.seat] += stage.kv_bytes
    memory = {
        (place.node.host, place.device_name): place.device.memory_bytes
        for place in places_of(inventory)
    }
    assert {seat: taken[seat] + free[seat] for seat in taken} == {
        seat: memory[seat] for seat in taken
    }
    # What is not used is accounted for too: a node by itself, or a device of one that is used.
    idle = {(each.host, each.device) for each in found.unused}
    for host, device in memory.keys() - taken.keys():
        assert (host, device if host in found.hosts else None) in idle


def test_the_headline_says_what_was_asked_for_and_what_is_used() -> None:
    inventory = Inventory(nodes=(node("a", 200, 100), node("pi", 1, 5)))
    found, said = both(inventory, asked("throughput"))
    first = plan_table(found, said, name="mixtral").splitlines()[0]
    assert first == (
        "plan for mixtral (93.4 GB in bf16), 4 x 4096 tokens, goal throughput: on 1 of 2 nodes"
    )
    assert max(map(len, plan_table(found, said, width=60, name="mixtral").splitlines())) <= 60
    assert plan_json(found, said, name="mixtral")["request"]["num_nodes"] == 2


def test_a_goal_that_cannot_be_followed_for_want_of_speeds_is_said() -> None:
    unknown = replace(node("b", 150, 1), devices=(Device(kind="cpu", memory_bytes=150 * GB),))
    found, said = both(Inventory(nodes=(node("a", 70, 100), unknown)), asked("throughput"))
    assert found.prediction is None
    (note,) = said.notes
    assert "memory alone, and not for throughput: nobody knows how fast b cpu reads" in note
    assert f"note: {note}" in plan_table(found, said)
    _, said = both(Inventory(nodes=(node("a", 200, 100),)), asked("throughput"))
    assert said.notes == ()


def test_the_picture_says_what_the_table_says() -> None:
    inventory = Inventory(nodes=(node("a", 120, 100), node("pi", 1, 5)))
    found, said = both(inventory, asked())
    drawn = plan_svg(found, said, num_experts=8, title="mixtral")
    texts = [
        each.text for each in ElementTree.fromstring(drawn).iter() if each.tag.endswith("text")
    ]
    for start in (
        "plan for mixtral (93.4 GB",
        "to do better: --dtype int8",
        "to fetch: ",
        "unused: ",
    ):
        assert any(text and text.startswith(start) for text in texts)


def test_what_holds_up_all_streams_together_is_said() -> None:
    nodes = (node("a", 70, 1000), node("b", 70, 1000))
    far = (Link(source="a", target="b", rtt_s=0.2, gbps=1.0),)
    found, said = both(Inventory(nodes=nodes, links=far), asked("throughput"))
    text = plan_table(found, said)
    told = found.prediction
    assert told is not None
    between = sum(stage.hop_s or 0 for stage in found.stages)
    assert between > 0.19
    assert f"{between * 1000:.0f} ms between them" in text
    slowest = max(stage.step_s or 0 for stage in found.stages)
    share = told.tokens_per_s * slowest / told.step_tokens
    assert share < 0.5
    assert f"works {share:.0%} of the time: more sequences at once" in text
    close = (replace(far[0], rtt_s=0.0001),)
    found, said = both(
        Inventory(nodes=nodes, links=close), replace(asked("throughput"), max_concurrency=64)
    )
    (line,) = [line for line in plan_table(found, said).splitlines() if "bottleneck" in line]
    assert line.endswith("% of the time")


def test_every_field_of_a_plan_is_documented() -> None:
    inventory = load_inventory(SCENARIOS / "one-card-beside-a-large-host.yaml", environment={})
    found, said = both(inventory, replace(asked("throughput"), separate_experts=True))
    document = plan_json(found, said, name="mixtral")
    text = (SCENARIOS.parent.parent / "docs" / "plans.md").read_text(encoding="utf-8")

    def fields(value: object) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield key
            yield from fields(inner)
        for inner in value if isinstance(value, list | tuple) else ():
            yield from fields(inner)

    assert {"request", "workspace_bytes", "missing_bytes"} <= set(fields(document))
    assert [name for name in fields(document) if not re.search(rf"`{name}(\[\])?`", text)] == []
