"""A plan for people (a table) and for programs (a JSON object)."""

from dataclasses import asdict
from typing import Any

from ..plan import Plan, Prediction
from ..units import gigabytes, milliseconds


def plan_table(plan: Plan) -> str:
    """The stages as aligned columns, then what was conceded and which nodes stay idle."""
    head = ("stage", "node", "device", "layers", "dtype", "weights", "kv", "free", "threads")
    rows: list[tuple[str, ...]] = [head]
    prediction = plan.prediction
    if prediction is not None:
        rows = [(*head, "step", "hop", "")]
    for stage in plan.stages:
        ends = " + embeddings" * stage.has_embeddings + " + head" * stage.has_output
        row: tuple[str, ...] = (
            str(stage.index),
            stage.host,
            stage.device,
            f"{stage.first_layer}-{stage.end_layer - 1}{ends}",
            stage.dtype,
            gigabytes(stage.weights_bytes),
            gigabytes(stage.kv_bytes),
            gigabytes(stage.free_bytes),
            str(stage.num_threads),
        )
        if prediction is not None:
            slowest = "<- slowest" * (stage.index == prediction.bottleneck and len(plan.stages) > 1)
            row += (milliseconds(stage.step_s or 0), milliseconds(stage.hop_s or 0), slowest)
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append(
        f"context {plan.max_context_tokens} tokens, {plan.max_concurrency} sequences at once "
        f"({plan.num_kv_blocks} KV blocks)"
    )
    if prediction is not None:
        lines += _predicted(prediction)
    lines.extend(f"note: {note}" for note in plan.notes)
    lines.extend(f"unused: {node.host}: {node.reason}" for node in plan.unused)
    return "\n".join(lines)


def _predicted(prediction: Prediction) -> list[str]:
    return [
        f"predicted for {prediction.objective}: {prediction.tokens_per_s:.1f} tokens/s in all, "
        f"{prediction.stream_tokens_per_s:.1f} tokens/s for one stream alone, a first token after "
        f"{milliseconds(prediction.prefill_s)} ({prediction.prefill_tokens} tokens of prompt); "
        f"a step of {prediction.step_tokens} goes around in "
        f"{milliseconds(prediction.round_trip_s)}",
        *(f"assumed: {said}" for said in prediction.assumed),
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole plan with the field names of `Plan`; amounts are bytes and tokens."""
    return asdict(plan)
