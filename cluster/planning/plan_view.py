"""A plan for people (a table) and for programs (a JSON object)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..plan import ExpertHost, ExpertIds, Pipeline, Plan, StagePlan
from ..units import gigabytes, id_ranges, milliseconds, wrapped
from .explanation import Explanation
from .plan_lines import explained_lines, headline, pipeline_text, plan_lines

_HEAD = (
    *("stage", "node", "device", "layers", "experts", "dtype", "weights", "kv", "work", "free"),
    *("threads", "step", "hop", ""),
)
_LEAST_NEEDED = ("threads", "work", "hop", "free", "kv", "device")
"""Columns that a narrow terminal does without, in this order; `-o json` has all."""


def plan_table(
    plan: Plan,
    explanation: Explanation | None = None,
    *,
    width: int | None = None,
    name: str | None = None,
) -> str:
    """The stages as aligned columns, their helpers below them, then what is to be said of them;
    above them, where `name` is that of the model, what the plan is for.

    Lines are at most `width` long where the table can be made so narrow; None: as long as they are.
    """
    told = plan.prediction
    rows = _table(plan, with_ends=True)
    dropped = () if told is not None else ("step", "hop", "")
    left_out: list[str] = []
    lines = _columns(rows, dropped)
    if width is not None and max(map(len, lines)) > width:
        rows = _table(plan, with_ends=False)
        lines = _columns(rows, dropped)
    says_nothing = all(row[4] == "all" for row in rows[1:])
    for column in ("experts",) * says_nothing + _LEAST_NEEDED:
        if width is None or max(map(len, lines)) <= width:
            break
        if column not in dropped:
            left_out.append(column)
            lines = _columns(rows, (*dropped, *left_out))
    for column in left_out[::-1]:  # what was wide made room for it
        wider = _columns(rows, (*dropped, *(each for each in left_out if each != column)))
        if width is not None and max(map(len, wider)) <= width:
            left_out.remove(column)
            lines = wider
    told_of = explanation or Explanation()
    said = [*plan_lines(plan, left_out), *explained_lines(told_of)]
    above = [headline(plan, told_of, name)] if name is not None else []
    head, text = (
        [line for each in part for line in wrapped(each, width)] for part in (above, said)
    )
    return "\n".join([*head, *_grouped(plan, lines, width), *text])


def _grouped(plan: Plan, lines: Sequence[str], width: int | None) -> Iterator[str]:
    """Of several pipelines each with a line above its stages."""
    head, *rest = lines
    yield head
    for number, pipeline in enumerate(plan.pipelines):
        if len(plan.pipelines) > 1:
            yield from wrapped(f"pipeline {number}: {pipeline_text(pipeline)}", width)
        count = sum(1 + len(stage.helpers) for stage in pipeline.stages)
        yield from rest[:count]
        rest = rest[count:]


def _table(plan: Plan, *, with_ends: bool) -> list[tuple[str, ...]]:
    """`with_ends` says of the first and the last stage that they have the ends of the model."""
    stages = [
        list(_rows(stage, pipeline, with_ends=with_ends))
        for pipeline in plan.pipelines
        for stage in pipeline.stages
    ]
    return [_HEAD, *(row for stage in stages for row in stage)]


def _rows(stage: StagePlan, pipeline: Pipeline, *, with_ends: bool) -> Iterator[tuple[str, ...]]:
    is_slowest = stage.index == pipeline.bottleneck and len(pipeline.stages) > 1
    layers = id_ranges(range(stage.first_layer, stage.end_layer))
    ends = ""
    if with_ends:
        ends = " + embeddings" * stage.has_embeddings + " + head" * stage.has_output
    yield (
        str(stage.index),
        stage.host,
        stage.device,
        layers + ends,
        "all" if stage.experts is None else _experts(stage.experts),
        stage.dtype,
        gigabytes(stage.weights_bytes),
        gigabytes(stage.kv_bytes),
        gigabytes(stage.workspace_bytes),
        gigabytes(stage.free_bytes),
        str(stage.num_threads),
        milliseconds(stage.step_s or 0),
        milliseconds(stage.hop_s or 0),
        "<- slowest" * is_slowest,
    )
    yield from (_helper_row(helper, stage, layers) for helper in stage.helpers)


def _helper_row(helper: ExpertHost, stage: StagePlan, layers: str) -> tuple[str, ...]:
    return (
        "",
        helper.host,
        helper.device,
        layers,
        _experts(helper.experts),
        stage.dtype,
        gigabytes(helper.weights_bytes),
        "-",
        gigabytes(helper.workspace_bytes),
        gigabytes(helper.free_bytes),
        str(helper.num_threads),
        milliseconds(helper.step_s or 0),
        milliseconds(helper.hop_s or 0),
        "",
    )


def _experts(experts: ExpertIds) -> str:
    """The same ones of every layer by id, else how many there are of a layer."""
    if len(set(experts)) == 1:
        return id_ranges(experts[0]) or "none"
    counts = sorted({len(ids) for ids in experts})
    least, most = counts[0], counts[-1]
    return f"{least} a layer" if least == most else f"{least}-{most} a layer"


def _columns(rows: Sequence[tuple[str, ...]], left_out: Iterable[str]) -> list[str]:
    kept = [number for number, name in enumerate(rows[0]) if name not in tuple(left_out)]
    widths = [max(len(row[column]) for row in rows) for column in kept]
    return [
        "  ".join(
            row[column].ljust(width) for column, width in zip(kept, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def plan_json(
    plan: Plan, explanation: Explanation | None = None, *, name: str | None = None
) -> dict[str, Any]:
    """The whole plan with the field names of `Plan` and of its explanation; bytes, tokens."""
    head = {} if name is None else {"name": name}
    found = head | asdict(plan) | {"max_concurrency": plan.max_concurrency, "gap": plan.gap}
    for document, pipeline in zip(found["pipelines"], plan.pipelines, strict=True):
        document["bottleneck"] = pipeline.bottleneck
    found["prediction"] = None if plan.prediction is None else asdict(plan.prediction)
    if explanation is not None:
        found["request"] = None if explanation.request is None else asdict(explanation.request)
        found["notes"] = list(explanation.notes)
        found["improvements"] = [asdict(each) for each in explanation.improvements]
        found["fetches"] = [
            asdict(each) | {"missing_bytes": each.missing_bytes} for each in explanation.fetches
        ]
    return found
