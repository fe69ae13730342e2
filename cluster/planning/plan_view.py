"""A plan for people (a table) and for programs (a JSON object)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ..footprint import STEP_TOKENS
from ..plan import ExpertHost, ExpertIds, Pipeline, Plan, Prediction, StagePlan
from ..units import gigabytes, id_ranges, milliseconds, names_text, wrapped
from .explanation import Explanation, NodeFetch

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
    said = [*_said(plan, left_out), *explained_lines(told_of)]
    above = [headline(plan, told_of, name)] if name is not None else []
    head, text = (
        [line for each in part for line in wrapped(each, width)] for part in (above, said)
    )
    return "\n".join([*head, *_grouped(plan, lines, width), *text])


def headline(plan: Plan, explanation: Explanation, name: str) -> str:
    """What was asked for, and how much of what there is the plan uses."""
    asked, used = explanation.request, len(plan.hosts)
    if asked is None:
        return f"plan for {name}"
    return (
        f"plan for {name} ({gigabytes(asked.stored_bytes)} in {asked.stored_dtype}), "
        f"{asked.max_concurrency} x {asked.max_context_tokens} tokens, goal {asked.objective}: "
        f"on {used} of {asked.num_nodes} node{'s' * (asked.num_nodes != 1)}"
    )


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


def pipeline_text(pipeline: Pipeline) -> str:
    """What one of several pipelines does, for people."""
    count = pipeline.max_concurrency
    said = f"{count} sequence{'s' * (count != 1)} at once ({pipeline.num_kv_blocks} KV blocks)"
    if pipeline.prediction is not None:
        said += f", {pipeline.prediction.tokens_per_s:.1f} tokens/s"
    if (num_steps := pipeline.num_micro_batches or 1) > 1:
        said += f", in {num_steps} steps by turns"
    return said


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


def _said(plan: Plan, left_out: Sequence[str]) -> Iterator[str]:
    if left_out:
        yield f"not shown for want of room: {', '.join(left_out)} (-o json has all)"
    several = f" on {len(plan.pipelines)} pipelines" * (len(plan.pipelines) > 1)
    yield (
        f"context {plan.max_context_tokens} tokens, {plan.max_concurrency} sequences at once"
        f"{several} ({plan.num_kv_blocks} KV blocks)"
    )
    if plan.prediction is not None:
        yield from _predicted(plan.prediction, plan)
    yield from (f"conceded: {each.text}" for each in plan.concessions)
    yield from unused_lines(plan)


def unused_lines(plan: Plan) -> Iterator[str]:
    """What lies idle and why; all for one reason together."""
    alike = groupby(sorted(plan.unused, key=lambda node: node.reason), lambda node: node.reason)
    for reason, nodes in alike:
        yield f"unused: {names_text(node.name for node in nodes)}: {reason}"


def _predicted(prediction: Prediction, plan: Plan) -> Iterator[str]:
    yield (
        f"predicted for {prediction.objective}: {prediction.tokens_per_s:.1f} tokens/s in all, "
        f"{prediction.stream_tokens_per_s:.1f} tokens/s for one stream alone, a first token after "
        f"{milliseconds(prediction.prefill_s)} ({prediction.prefill_tokens} tokens of prompt)"
    )
    cut = ""
    if len(plan.pipelines) == 1 and (num_steps := plan.pipelines[0].num_micro_batches or 1) > 1:
        cut = f"; {plan.max_concurrency} sequences decode in {num_steps} steps by turns"
    if (chunk := max(each.max_step_tokens or 0 for each in plan.pipelines)) not in (0, STEP_TOKENS):
        cut += f"; steps have at most {chunk} tokens, for prompts hold up the others"
    several = " on the slowest pipeline" * (len(plan.pipelines) > 1)
    step = max(each.prediction.step_tokens for each in plan.pipelines if each.prediction)
    yield (
        f"a step of {step} goes around in {milliseconds(prediction.round_trip_s)}{several}"
        f"{_on_the_way(plan)}{cut}"
    )
    if busiest := _busiest(plan):
        yield busiest
    if bound := bound_text(plan):
        yield f"bound: {bound}"
    yield from (f"assumed: {said}" for said in prediction.assumed)


def _on_the_way(plan: Plan) -> str:
    """How much of a round trip is spent between stages, of a single pipeline with several."""
    if len(plan.pipelines) > 1 or len(plan.stages) == 1:
        return ""
    computing = sum(stage.step_s or 0 for stage in plan.stages)
    between = sum(stage.hop_s or 0 for stage in plan.stages)
    return f" ({milliseconds(computing)} in stages, {milliseconds(between)} between them)"


def _busiest(plan: Plan) -> str | None:
    """What holds up all streams together: a stage that always works, or too few of them."""
    told = plan.prediction
    if told is None or told.objective != "throughput" or len(plan.pipelines) > 1:
        return None
    (pipeline,) = plan.pipelines
    assert pipeline.bottleneck is not None
    stage = pipeline.stages[pipeline.bottleneck]
    on_device = [each.step_s or 0 for each in pipeline.stages if each.seat == stage.seat]
    share = min(1.0, told.tokens_per_s * sum(on_device) / told.step_tokens)
    more = (
        "" if share > 0.95 else ": more sequences at once (--max-concurrency) would use it better"
    )
    return f"bottleneck: {stage.host} {stage.device} works {share:.0%} of the time{more}"


def bound_text(plan: Plan) -> str | None:
    """How much better a plan could be at all; None where nobody can say."""
    told, best, gap = plan.prediction, plan.best_possible, plan.gap
    if told is None or best is None or gap is None:
        return None
    if gap < 0.0005:
        return "no plan is better under this model"
    limit = f"{best:.1f} tokens/s" if told.objective == "throughput" else milliseconds(best)
    return f"within {gap:.1%} of the best possible under this model (bound: {limit})"


def explained_lines(explanation: Explanation) -> Iterator[str]:
    """What the plan leaves open."""
    yield from (f"note: {note}" for note in explanation.notes)
    for better in explanation.improvements:
        yield f"to do better: {better.change}: {better.effect}"
    if any(fetch.needed_bytes for fetch in explanation.fetches):
        yield _to_fetch(explanation.fetches)


def _to_fetch(fetches: Sequence[NodeFetch]) -> str:
    """The whole, and of several nodes each; those with the same to fetch together."""
    if not any(fetch.missing_bytes for fetch in fetches):
        return "to fetch: nothing, for all is there"
    alike: dict[str, list[str]] = {}
    for fetch in fetches:
        of = f" of {gigabytes(fetch.needed_bytes)}" if fetch.held_bytes else ""
        said = f"{gigabytes(fetch.missing_bytes)}{of}"
        if not fetch.missing_bytes:
            said = f"nothing, for all {gigabytes(fetch.needed_bytes)} are there"
        alike.setdefault(said, []).append(fetch.host)
    each = [
        f"{names_text(hosts)} {'each ' * (len(hosts) > 1)}{said}" for said, hosts in alike.items()
    ]
    if len(fetches) == 1:
        return f"to fetch: {each[0]}"
    missing = sum(fetch.missing_bytes for fetch in fetches)
    return f"to fetch: {gigabytes(missing)} in all: {'; '.join(each)}"


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
