"""What is said of a plan in sentences, for tables and pictures."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from ..footprint import STEP_TOKENS
from ..plan import Pipeline, Plan, Prediction
from ..units import gigabytes, milliseconds, names_text
from .explanation import Explanation, NodeFetch


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


def pipeline_text(pipeline: Pipeline) -> str:
    """What one of several pipelines does, for people."""
    count = pipeline.max_concurrency
    said = f"{count} sequence{'s' * (count != 1)} at once ({pipeline.num_kv_blocks} KV blocks)"
    if pipeline.prediction is not None:
        said += f", {pipeline.prediction.tokens_per_s:.1f} tokens/s"
    if (num_steps := pipeline.num_micro_batches or 1) > 1:
        said += f", in {num_steps} steps by turns"
    return said


def plan_lines(plan: Plan, left_out: Sequence[str] = ()) -> Iterator[str]:
    """What it is like as a whole, and what of a table was `left_out`."""
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
    yield from _unused_lines(plan)


def _unused_lines(plan: Plan) -> Iterator[str]:
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
    if bound := _bound_text(plan):
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


def _bound_text(plan: Plan) -> str | None:
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
