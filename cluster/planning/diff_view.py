"""What changes from one plan to another, for people (lines) and for programs (a JSON object)."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..units import gigabytes, id_ranges, layers_text
from .plan_diff import PlanDiff

_LABELS = {
    "num_pipelines": "pipelines",
    "num_stages": "stages",
    "max_context_tokens": "tokens of context",
    "max_concurrency": "sequences at once",
    "num_kv_blocks": "KV blocks",
    "tokens_per_s": "tokens/s in all",
    "stream_tokens_per_s": "tokens/s for one stream alone",
}
"""Settings and what is predicted, for people."""


def diff_table(diff: PlanDiff, notes: Sequence[str] = ()) -> str:
    """For people: ``~`` moves, ``+`` and ``-`` what nodes gain and drop, ``=`` the sum of both."""
    said = [f"note: {note}" for note in notes]
    if diff.is_empty:
        return "\n".join(["no changes: the plan is the one that runs", *said])
    lines = []
    for move in diff.moves:
        layers = layers_text(move.first_layer, move.end_layer)
        what = "" if move.experts is None else f" experts {id_ranges(move.experts)}"
        lines.append(f"~ {layers}{what}: {_said(move.before)} -> {_said(move.after)}")
    lines += [f"~ {_LABELS[name]}: {was} -> {now}" for name, was, now in diff.settings]
    for node in diff.nodes:
        if node.gained_bytes:
            lines.append(
                f"+ {node.host}: {gigabytes(node.gained_bytes)} to load, fetched if missing"
            )
        if node.dropped_bytes:
            lines.append(f"- {node.host}: {gigabytes(node.dropped_bytes)} no longer loaded")
    gained = gigabytes(sum(node.gained_bytes for node in diff.nodes))
    dropped = gigabytes(sum(node.dropped_bytes for node in diff.nodes))
    if len(diff.nodes) > 1:
        lines.append(f"= {gained} to load and {dropped} no longer, in all")
    lines += [
        f"predicted {_LABELS[name]}: {was:.1f} -> {now:.1f} ({now / was - 1:+.0%})"
        for name, was, now in diff.predicted
        if was > 0
    ]
    return "\n".join([*lines, *said])


def diff_json(diff: PlanDiff, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The same with the field names of `PlanDiff`."""
    return asdict(diff) | {"is_empty": diff.is_empty, "notes": list(notes)}


def _said(places: Iterable[str]) -> str:
    return " and ".join(places) or "nobody"
