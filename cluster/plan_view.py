"""A plan for people (a table) and for programs (a JSON object)."""

from dataclasses import asdict
from typing import Any

from .plan import Plan
from .planner import gigabytes


def plan_table(plan: Plan) -> str:
    """The stages as aligned columns, then what was conceded and which nodes stay idle."""
    rows = [("stage", "node", "device", "layers", "dtype", "weights", "kv", "free", "threads")]
    for stage in plan.stages:
        ends = " + embeddings" * stage.has_embeddings + " + head" * stage.has_output
        rows.append(
            (
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
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append(
        f"context {plan.max_context_tokens} tokens, {plan.max_concurrency} sequences at once "
        f"({plan.num_kv_blocks} KV blocks)"
    )
    lines.extend(f"note: {note}" for note in plan.notes)
    lines.extend(f"unused: {node.host}: {node.reason}" for node in plan.unused)
    return "\n".join(lines)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole plan with the field names of `Plan`; amounts are bytes and tokens."""
    return asdict(plan)
