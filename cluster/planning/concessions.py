"""What a plan concedes so that the model fits: a shorter context, and weights of fewer bits."""

from dataclasses import replace

from ..footprint import Footprint
from ..machines import ComputeDtype
from ..plan import Concession, Plan, Workload
from ..search.weighed import WeighedModel
from ..units import gigabytes, id_ranges
from .memory_plan import kv_bytes_of


def conceded(
    plan: Plan, model: WeighedModel, stored: ComputeDtype, asked: Workload
) -> tuple[Concession, ...]:
    """Against what was asked for, and weights as they are stored."""
    whole = model.footprint(stored)
    dtypes = sorted({stage.dtype for stage in plan.stages} - {stored})
    lowered = [_of_dtype(plan, dtype, whole, model.footprint(dtype), stored) for dtype in dtypes]
    if plan.max_context_tokens >= asked.max_context_tokens:
        return tuple(lowered)
    return (_of_context(plan, whole, asked), *lowered)


def _of_context(plan: Plan, weights: Footprint, asked: Workload) -> Concession:
    whole, kept = (
        kv_bytes_of(weights, replace(asked, max_context_tokens=tokens)) * len(weights.layer_bytes)
        for tokens in (asked.max_context_tokens, plan.max_context_tokens)
    )
    return Concession(
        knob="context",
        freed_bytes=whole - kept,
        text=f"context shortened from {asked.max_context_tokens} to "
        f"{plan.max_context_tokens} tokens, which frees {gigabytes(whole - kept)}: the "
        f"keys and values of {plan.max_concurrency} whole sequences do not fit",
    )


def _of_dtype(
    plan: Plan, dtype: ComputeDtype, whole: Footprint, held: Footprint, stored: ComputeDtype
) -> Concession:
    lowered = [stage for stage in plan.stages if stage.dtype == dtype]
    saved = sum(
        whole.layer_bytes[layer] - held.layer_bytes[layer]
        for stage in lowered
        for layer in range(stage.first_layer, stage.end_layer)
    )
    who = f"{_stages_with(plan, dtype)} hold{'s' * (len(lowered) == 1)}"
    return Concession(
        knob="dtype",
        freed_bytes=saved,
        text=f"{who} {dtype} in place of {stored}, which frees {gigabytes(saved)}: all in "
        f"{stored} do not fit",
    )


def _stages_with(plan: Plan, dtype: ComputeDtype) -> str:
    said = []
    for number, pipeline in enumerate(plan.pipelines):
        lowered = [stage.index for stage in pipeline.stages if stage.dtype == dtype]
        of = f" of pipeline {number}" if len(plan.pipelines) > 1 else ""
        if lowered:
            said.append(f"stage{'s' * (len(lowered) > 1)} {id_ranges(lowered)}{of}")
    return " and ".join(said)
