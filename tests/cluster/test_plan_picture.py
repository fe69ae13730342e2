"""The picture of a plan is well-formed and shows what the plan says."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from magnetar.cluster.plan import ExpertHost, Plan, Prediction, UnusedNode
from magnetar.cluster.planning.plan_picture import plan_svg
from magnetar.tests.cluster.test_plan_diff import BEFORE, cut, plan_of
from magnetar.tests.planning import GB

SVG = "{http://www.w3.org/2000/svg}"


def drawn(plan: Plan, num_experts: int = 8) -> ElementTree.Element:
    return ElementTree.fromstring(plan_svg(plan, num_experts=num_experts))


def texts(picture: ElementTree.Element) -> str:
    return "\n".join(element.text or "" for element in picture.iter(f"{SVG}text"))


@pytest.mark.parametrize(("num_experts", "num_cells"), [(0, 32), (8, 256)])
def test_a_layer_is_a_row_and_an_expert_a_cell(num_experts: int, num_cells: int) -> None:
    cells = [
        each
        for each in drawn(BEFORE, num_experts).iter(f"{SVG}rect")
        if each.get("height") == "7.5"
    ]
    assert len(cells) == num_cells


def test_what_rows_and_cells_mean_is_written_above_them() -> None:
    sparse, dense = texts(drawn(BEFORE)), texts(drawn(BEFORE, 0))
    assert "every cell is an expert" in sparse
    assert "every cell" not in dense
    for text in (sparse, dense):
        assert "every row is a layer" in text


def test_experts_on_helpers_have_another_colour_and_replicas_both() -> None:
    helper = ExpertHost(
        host="<helper>",
        device="cpu",
        num_threads=1,
        weights_bytes=GB,
        free_bytes=0,
        experts=((5, 6, 7),) * 22,
        hop_s=0.0011,
    )
    own = ((0, 1, 2, 3, 4, 5),) * 22
    first, second = BEFORE.stages
    picture = drawn(plan_of(first, replace(second, experts=own, helpers=(helper,))))
    cells = [e.get("fill") for e in picture.iter(f"{SVG}rect") if e.get("height") == "7.5"]
    assert len(cells) == 256 + 22  # a replica is one cell of two halves
    assert sum(colour != cells[0] for colour in cells) == 3 * 22
    assert "<helper> cpu: 66 experts, 1.1 ms a layer" in texts(picture)


def test_the_slowest_stage_and_idle_nodes_are_named() -> None:
    told = Prediction(
        objective="latency",
        step_tokens=1,
        round_trip_s=0.1,
        tokens_per_s=10.0,
        stream_tokens_per_s=10.0,
        prefill_s=1.0,
        prefill_tokens=512,
    )
    (pipeline,) = BEFORE.pipelines
    stages = tuple(replace(each, step_s=0.01 + each.index) for each in pipeline.stages)
    pipeline = replace(pipeline, stages=stages, prediction=told)
    unused = (UnusedNode(host="pi & co", reason="too small"),)
    said = texts(drawn(replace(BEFORE, pipelines=(pipeline,), unused=unused)))
    assert said.count("slowest") == 1
    assert "unused: pi & co: too small" in said


def test_many_stages_go_on_in_further_rows() -> None:
    picture = drawn(cut(*range(4, 33, 4)))
    boxes = [e for e in picture.iter(f"{SVG}rect") if e.get("rx") == "8"]
    assert len({e.get("y") for e in boxes}) == 2
    ways = [e for e in picture.iter(f"{SVG}path") if e.get("marker-end")]
    assert len(ways) == 8  # seven onwards, one back to the first
    (back,) = [e for e in ways if e.get("stroke-dasharray")]
    left = min(float(e.get("x", "inf")) for e in boxes)
    outside = float((back.get("d") or "").split("H")[1].split("V")[0])
    assert 0 < outside < left


def test_a_way_to_the_next_row_passes_below_the_highest_stage() -> None:
    picture = drawn(cut(20, 21, 22, 23, 24, 32))
    first = next(e for e in picture.iter(f"{SVG}rect") if e.get("rx") == "8")
    lowest = float(first.get("y", "0")) + float(first.get("height", "0"))
    ways = [e for e in picture.iter(f"{SVG}path") if e.get("marker-end")]
    onward = [e.get("d") or "" for e in ways if not e.get("stroke-dasharray")]
    (turning,) = [way for way in onward if "V" in way]
    assert float(turning.split("V")[1].split("H")[0]) > lowest


def test_a_long_name_is_drawn_within_its_box() -> None:
    first, second = BEFORE.stages
    long = plan_of(replace(first, host="a-host-with-a-very-long-name" * 2), second)
    (name,) = [e for e in drawn(long).iter(f"{SVG}text") if "very-long" in (e.text or "")]
    assert float(name.get("font-size", "inf")) * len(name.text or "") * 0.5 < 220
