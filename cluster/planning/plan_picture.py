"""A plan as an SVG picture: stages with their layers, experts and memory, and what links them.

Every row of a stage's grid is a layer, every cell an expert, coloured by the device that holds it;
a cell of two colours is a replica. A dense layer is one wide cell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from ..plan import Pipeline, Plan, StagePlan
from ..units import gigabytes, layers_text, milliseconds, wrapped
from .explanation import Explanation
from .plan_lines import explained_lines, headline, pipeline_text, plan_lines

_STAGE_WIDTH = 220
_LETTER = 0.53
"""Of the size of letters, how wide they are on average."""
_GAP = 96
_STAGES_PER_ROW = 5
_MARGIN = 24
_HEAD = 66
"""From the top of a stage to its grid: node, device, and what it computes."""
_LAYER_HEIGHT = 9
_LINE = 16
_OWN = "#5b7fc7"
_HELPERS = ("#5aa469", "#d08a3c", "#a05ba8", "#4aa3a8", "#b5564f", "#8a8f3c")
_DENSE = "every row is a layer; the bar below shows weights, keys and values, and free memory"
_LEGEND = f"every cell is an expert in the colour of the device that holds it, {_DENSE}"
_INK, _FAINT, _LINES, _HOT = "#1f2a3a", "#7a8699", "#44546a", "#b5322a"


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a stage is drawn."""

    x: float
    y: float
    height: float
    row_end: float
    """Where the highest box beside it ends."""


def plan_svg(
    plan: Plan, explanation: Explanation | None = None, *, num_experts: int, title: str = ""
) -> str:
    """The picture as an SVG document; `num_experts` of a layer, 0 of a dense model."""
    placed = _boxes(plan)
    boxes = [box for each in placed for box in each]
    longest = max(len(each) for each in placed)
    width = 2 * _MARGIN + min(longest, _STAGES_PER_ROW) * (_STAGE_WIDTH + _GAP) - _GAP
    width = max(width, 640)
    said = list(plan_lines(plan))
    if explanation is not None:
        above = [headline(plan, explanation, title)] if title else []
        said = [*above, *said, *explained_lines(explanation)]
    bottom = max(box.y + box.height for box in boxes) + 46
    columns = int((width - 2 * _MARGIN) / 6.4)
    lines = [(line, text is said[0]) for text in said for line in wrapped(text, columns)]
    height = bottom + len(lines) * _LINE + _MARGIN
    head = title or f"{len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}"
    if len(placed) > 1:
        head += f" in {len(placed)} pipelines" if not title else f": {len(placed)} pipelines"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' font-family="Helvetica, Arial, sans-serif" font-size="12" role="img"'
        f" aria-label={quoteattr(f'Plan: {head}')}>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{_LINES}"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fbfcfe"/>',
        _text(_MARGIN, _MARGIN + 6, head, size=16, bold=True),
        _text(
            _MARGIN,
            _MARGIN + 24,
            _LEGEND if num_experts else _DENSE,
            size=10.5,
            fill=_FAINT,
            room=width - 2 * _MARGIN,
        ),
    ]
    for number, (pipeline, own) in enumerate(zip(plan.pipelines, placed, strict=True)):
        parts += _links(pipeline, own)
        if len(placed) > 1:
            said_of = f"pipeline {number}: {pipeline_text(pipeline)}"
            parts.append(_text(own[0].x, own[0].y - 8, said_of, bold=True))
    slowest = [
        stage.index == pipeline.bottleneck and len(pipeline.stages) > 1
        for pipeline in plan.pipelines
        for stage in pipeline.stages
    ]
    for stage, box, is_slowest in zip(plan.stages, boxes, slowest, strict=True):
        parts += _stage(stage, box, num_experts=num_experts, is_slowest=is_slowest)
    parts += [
        _text(_MARGIN, bottom + number * _LINE, line, fill=_INK if is_first else _FAINT)
        for number, (line, is_first) in enumerate(lines)
    ]
    return "\n".join([*parts, "</svg>", ""])


def _boxes(plan: Plan) -> list[list[_Box]]:
    """Of each pipeline, in rows from left to right, each as high as its highest stage."""
    placed: list[list[_Box]] = []
    y = float(_MARGIN + 42)
    for pipeline in plan.pipelines:
        y += 20 * (len(plan.pipelines) > 1)  # for the line that names it
        boxes: list[_Box] = []
        for start in range(0, len(pipeline.stages), _STAGES_PER_ROW):
            row = pipeline.stages[start : start + _STAGES_PER_ROW]
            heights = [_stage_height(stage) for stage in row]
            boxes += [
                _Box(_MARGIN + number * (_STAGE_WIDTH + _GAP), y, height, y + max(heights))
                for number, height in enumerate(heights)
            ]
            y += max(heights) + 44
        placed.append(boxes)
    return placed


def _stage_height(stage: StagePlan) -> float:
    layers = stage.end_layer - stage.first_layer
    return _HEAD + layers * _LAYER_HEIGHT + 48 + len(stage.helpers) * _LINE


def _stage(stage: StagePlan, box: _Box, *, num_experts: int, is_slowest: bool) -> Iterator[str]:
    x, y = box.x, box.y
    yield (
        f'<rect x="{x}" y="{y}" width="{_STAGE_WIDTH}" height="{box.height:.0f}" rx="8"'
        f' fill="#ffffff" stroke="{_HOT if is_slowest else _OWN}"'
        f' stroke-width="{2.4 if is_slowest else 1.2}"/>'
    )
    ends = " + embeddings" * stage.has_embeddings + " + head" * stage.has_output
    step = "" if stage.step_s is None else f", {milliseconds(stage.step_s)} a step"
    room = _STAGE_WIDTH - (70 if is_slowest else 20)
    yield _text(x + 10, y + 20, f"{stage.index}  {stage.host}", size=14, bold=True, room=room)
    yield _text(x + 10, y + 37, f"{stage.device}, {stage.dtype}{step}", fill=_LINES)
    layers = layers_text(stage.first_layer, stage.end_layer)
    yield _text(x + 10, y + 54, layers + ends, fill=_LINES)
    if is_slowest:
        yield _text(x + _STAGE_WIDTH - 10, y + 20, "slowest", fill=_HOT, anchor="end")
    yield from _grid(stage, x + 10, y + _HEAD, _STAGE_WIDTH - 20, num_experts)
    below = y + _HEAD + (stage.end_layer - stage.first_layer) * _LAYER_HEIGHT + 8
    yield from _memory(stage, x + 10, below, _STAGE_WIDTH - 20)
    for number, helper in enumerate(stage.helpers):
        held = sum(len(row) for row in helper.experts)
        hop = "" if helper.hop_s is None else f", {milliseconds(helper.hop_s)} a layer"
        at = below + 40 + number * _LINE
        key = f'width="10" height="10" fill="{_colour(number)}"'
        yield f'<rect x="{x + 10}" y="{at - 9:.0f}" {key}/>'
        said = f"{helper.host} {helper.device}: {held} experts{hop}"
        yield _text(x + 26, at, said, size=11, room=_STAGE_WIDTH - 36)


def _grid(stage: StagePlan, x: float, y: float, width: float, num_experts: int) -> Iterator[str]:
    columns = max(1, num_experts)
    cell = width / columns
    for row in range(stage.end_layer - stage.first_layer):
        layer, top = stage.first_layer + row, y + row * _LAYER_HEIGHT
        for expert in range(columns):
            holders = stage.holders(layer, expert) if num_experts else (-1,)
            colours = [_colour(holder) for holder in holders] or ["none"]
            part = (cell - 1) / len(colours)
            for number, colour in enumerate(colours):
                yield (
                    f'<rect x="{x + expert * cell + number * part:.1f}" y="{top:.1f}"'
                    f' width="{part:.1f}" height="{_LAYER_HEIGHT - 1.5}" fill="{colour}"/>'
                )


def _memory(stage: StagePlan, x: float, y: float, width: float) -> Iterator[str]:
    """A bar of what the device holds, and the amounts below it."""
    other = max(0, stage.free_bytes)
    total = max(1, stage.weights_bytes + stage.kv_bytes + other)
    at = x
    for amount, colour in (
        (stage.weights_bytes, _OWN),
        (stage.kv_bytes, "#d9c27a"),
        (other, "#e4e8ef"),
    ):
        share = width * amount / total
        yield f'<rect x="{at:.1f}" y="{y:.1f}" width="{share:.1f}" height="8" fill="{colour}"/>'
        at += share
    amounts = (
        f"{gigabytes(stage.weights_bytes)} weights, {gigabytes(stage.kv_bytes)} KV, "
        f"{gigabytes(stage.free_bytes)} free"
    )
    yield _text(x, y + 21, amounts, size=10.5, fill=_FAINT, room=width)


def _links(pipeline: Pipeline, boxes: Sequence[_Box]) -> Iterator[str]:
    """Hidden states from stage to stage, token ids from the last one back to the first."""
    for stage, box, after in zip(pipeline.stages, boxes, boxes[1:], strict=False):
        label = "" if stage.hop_s is None else milliseconds(stage.hop_s)
        if after.y == box.y:
            y = box.y + 34
            yield _arrow(f"M{box.x + _STAGE_WIDTH} {y}H{after.x - 3}")
            yield _text((box.x + _STAGE_WIDTH + after.x) / 2, y - 6, label, anchor="middle")
        else:
            turn = box.row_end + 18
            middle = box.x + _STAGE_WIDTH / 2
            yield _arrow(
                f"M{middle} {box.y + box.height}V{turn}H{after.x + _STAGE_WIDTH / 2}V{after.y - 3}"
            )
            yield _text(middle - 6, turn - 4, label, anchor="end")
    if len(boxes) > 1:
        back = pipeline.stages[-1].hop_s
        label = "tokens" if back is None else f"tokens, {milliseconds(back)}"
        yield from _way_back(boxes[0], boxes[-1], label)


def _way_back(first: _Box, last: _Box, label: str) -> Iterator[str]:
    """Below a row of stages; where there are several rows, outside of them."""
    start, low = last.x + _STAGE_WIDTH / 2, last.row_end + 12
    leave = f"M{start} {last.y + last.height}V{low}"
    if first.y == last.y:
        end = first.x + _STAGE_WIDTH / 2
        yield _arrow(f"{leave}H{end}V{first.y + first.height + 3}", dashed=True)
    else:
        end = first.x - _MARGIN / 2
        yield _arrow(f"{leave}H{end}V{first.y + 34}H{first.x - 3}", dashed=True)
    yield _text((start + end) / 2, low + 13, label, anchor="middle", fill=_FAINT)


def _colour(holder: int) -> str:
    """Of the stage's own device for -1, else of its helper of that number."""
    return _OWN if holder < 0 else _HELPERS[holder % len(_HELPERS)]


def _arrow(path: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<path d="{path}" fill="none" stroke="{_LINES}" stroke-width="1.4"'
        f' marker-end="url(#tip)"{dashes}/>'
    )


def _text(
    x: float,
    y: float,
    said: str,
    *,
    size: float = 12,
    fill: str = _INK,
    anchor: str = "start",
    bold: bool = False,
    room: float | None = None,
) -> str:
    """`room` is how wide it may be: what is likely wider has smaller letters."""
    weight = ' font-weight="bold"' if bold else ""
    if room is not None:
        size = min(size, round(room / (len(said) * _LETTER), 1))
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"'
        f' text-anchor="{anchor}"{weight}>{escape(said)}</text>'
    )
