"""Place a model on machines: a pure function from weights, machines and wishes to a plan.

Whole layers, consecutive stages, every byte counted on the device that holds it. Where the speeds
of all nodes are known, the search of `speed_plan.py` decides. Otherwise stages are balanced by
bytes, not by memory size: a large memory is not a fast one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial

from ...errors import InfeasiblePlanError, UsageError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ..footprint import Footprint, footprint, stored_dtype
from ..machines import ComputeDtype, Inventory
from ..plan import Concession, Objective, Plan, StagePlan, UnusedNode, Workload, check_experts
from ..search.cost import device_speed
from ..search.place import MARGIN, places_of
from ..search.placing import Placing
from ..units import gigabytes, id_ranges
from .dtype_ladder import dtype_choices, lower_dtypes
from .memory_plan import (
    kv_bytes_of,
    pipelines_by_memory,
    shorten,
    smallest_stage_bytes,
    unused_by_memory,
)
from .node_wishes import without_limits
from .pipelines_plan import PipelinesPlanner
from .refusal import pins_refused, refused
from .soundness import check_inventory
from .speed_plan import speeds_known

__all__ = ["MARGIN", "gigabytes", "plan", "predicted"]

_ALIKE_GBPS = 100.0
"""What every device is taken to read where nobody knows and pins leave something to choose."""


def plan(config: ModelConfig, index: TensorIndex, inventory: Inventory, workload: Workload) -> Plan:
    """Place every layer of the model.

    Where all speeds are known, the placement that decodes fastest under the cost model, for the
    objective of the workload; for ``throughput`` in as many pipelines as are best. Otherwise, or
    for the objective ``fit``: as few devices as fit (accelerators first), or the number of stages
    asked for, spread over as many devices as there are; nodes that hold bytes of the release
    already come first, then those with more memory.

    Where the keys and values of the wished context do not fit on all devices together, the context
    shrinks down to ``workload.min_context_tokens``. Where the weights do not fit as they are stored
    and the workload names no dtype, as few layers as possible are held in 8 bits, and if that is
    not enough, in 4. `Plan.concessions` say both.

    Raises:
        UsageError: the wishes make no sense, e.g. more stages than layers.
        InventoryError: the inventory has numbers that cannot be.
        InfeasiblePlanError: no placement fits; the message has the numbers per node.
    """
    check_inventory(inventory)
    _check(config, inventory, workload)
    allowed, wanted = without_limits(config, inventory, workload)
    stored = workload.dtype or stored_dtype(index)
    ladder = (stored,) if workload.dtype else (stored, *lower_dtypes(stored))
    for rung in range(len(ladder)):
        model = _Model(config, index, ladder[rung])
        found = _best(model, ladder[: rung + 1], allowed, wanted)
        if found is None and workload.min_context_tokens is not None:
            floor = workload.min_context_tokens
            # Whole layers alone may not fit at any length, and experts apart still do.
            shorter = shorten(model.weights, allowed, wanted, floor) or replace(
                wanted, max_context_tokens=floor
            )
            found = _best(model, ladder[: rung + 1], allowed, shorter)
        if found is not None:
            return _told(found, stored, index, config, inventory, workload)
    said = (config, index, ladder[-1], allowed, wanted, partial(can_plan, config, index))
    if wanted.nodes and _best(model, ladder, allowed, replace(wanted, nodes=())) is not None:
        raise pins_refused(*said)
    raise refused(*said)


def can_plan(
    config: ModelConfig, index: TensorIndex, inventory: Inventory, workload: Workload
) -> bool:
    """Whether there is a plan with all layers in the dtype of the workload and with its whole
    context; `inventory` and `workload` are as `without_limits` leaves them."""
    # All that decides is memory, and one stream is the least to look through.
    objective: Objective = "fit" if workload.objective == "fit" else "latency"
    model = _Model(config, index, workload.dtype or stored_dtype(index))
    asked = replace(workload, objective=objective)
    return _best(model, (model.dtype,), inventory, asked) is not None


def predicted(
    plan: Plan,
    config: ModelConfig,
    index: TensorIndex,
    inventory: Inventory,
    workload: Workload,
) -> Plan:
    """A plan, made for whatever, with the times that it would have for `workload`.

    It comes back without times where a speed is not known.
    """
    model = _Model(config, index, workload.dtype or stored_dtype(index))
    if not speeds_known(inventory, model.dtype):
        return _without_times(plan)
    dtype_of = {}
    for stage in plan.stages:
        dtype_of[stage.host, stage.device] = stage.dtype
        dtype_of |= {(helper.host, helper.device): stage.dtype for helper in stage.helpers}
    dtypes = tuple(
        dtype_of.get((place.node.host, place.device_name), model.dtype)
        for place in places_of(inventory)
    )
    return _speed_planner(model, inventory, workload, dtypes).predicted(plan)


@dataclass(frozen=True)
class _Model:
    config: ModelConfig
    index: TensorIndex
    dtype: ComputeDtype

    @cached_property
    def weights(self) -> Footprint:
        return footprint(self.config, self.index, self.dtype)


def _best(
    model: _Model, ladder: tuple[ComputeDtype, ...], inventory: Inventory, workload: Workload
) -> Plan | None:
    """The best plan whose lowest dtype is the last of the ladder; None: nothing fits."""
    if any(wish.layers for wish in workload.nodes) and not speeds_known(inventory, model.dtype):
        return _with_pins_alone(model, ladder, inventory, workload)
    if workload.objective != "fit" and speeds_known(inventory, model.dtype):
        for dtypes in _dtypes(model, ladder, inventory, workload):
            fast = _speed_planner(model, inventory, workload, dtypes)
            if fast.found:
                return _by_speed(model, fast, inventory, workload)
        if workload.nodes and any(wish.layers for wish in workload.nodes):
            return None
    weights = model.weights
    pipelines = pipelines_by_memory(weights, inventory, workload, model.dtype)
    if pipelines is None:
        return None
    placed = Plan(
        pipelines=pipelines,
        max_context_tokens=workload.max_context_tokens,
    )
    placed = replace(placed, unused=unused_by_memory(weights, inventory, workload, pipelines))
    if not speeds_known(inventory, model.dtype):
        return placed
    return _speed_planner(model, inventory, workload, None).predicted(placed)


def _by_speed(
    model: _Model, fast: PipelinesPlanner, inventory: Inventory, workload: Workload
) -> Plan:
    placed = Plan(
        pipelines=fast.pipelines({node.host: node.num_cpus for node in inventory.nodes}),
        max_context_tokens=workload.max_context_tokens,
    )
    check_experts(placed, model.config.num_experts)
    if placed.prediction is not None:
        placed = replace(placed, best_possible=fast.best_possible())
    smallest = smallest_stage_bytes(model.weights, workload)
    return replace(placed, unused=fast.unused(placed.pipelines, smallest))


def _without_times(plan: Plan) -> Plan:
    def untimed(stage: StagePlan) -> StagePlan:
        helpers = tuple(replace(each, step_s=None, hop_s=None) for each in stage.helpers)
        return replace(stage, step_s=None, hop_s=None, helpers=helpers)

    pipelines = tuple(
        replace(each, stages=tuple(map(untimed, each.stages)), prediction=None)
        for each in plan.pipelines
    )
    return replace(plan, pipelines=pipelines, best_possible=None)


def _with_pins_alone(
    model: _Model, ladder: tuple[ComputeDtype, ...], inventory: Inventory, workload: Workload
) -> Plan | None:
    """Pins where speeds are unknown: the search with all devices alike, and no predictions."""
    alike = replace(
        inventory,
        nodes=tuple(
            replace(node, devices=tuple(replace(d, read_gbps=_ALIKE_GBPS) for d in node.devices))
            for node in inventory.nodes
        ),
    )
    plan = _best(model, ladder, alike, replace(workload, objective="latency"))
    if plan is None:
        return None
    plan = _without_times(plan)
    pipelines = tuple(replace(each, num_micro_batches=None) for each in plan.pipelines)
    unused = tuple(
        UnusedNode(host=node.host, reason="not needed: the others hold the whole model")
        for node in inventory.nodes
        if node.host not in plan.hosts
    )
    return replace(plan, pipelines=pipelines, unused=unused)


def _dtypes(
    model: _Model, ladder: tuple[ComputeDtype, ...], inventory: Inventory, workload: Workload
) -> Iterable[tuple[ComputeDtype, ...]]:
    """A dtype for every place, the least loss first, the last rung of the ladder alone."""
    places = places_of(inventory)
    if len(ladder) == 1:
        return [(model.dtype,) * len(places)]
    room = {}
    for dtype in ladder[-2:]:
        weights = footprint(model.config, model.index, dtype)
        layer = max(weights.layer_bytes) + kv_bytes_of(weights, workload)
        overhead = weights.workspace_bytes(workload.max_context_tokens)
        room[dtype] = [
            max(0, place.usable_bytes - overhead) // layer + workload.separate_experts
            for place in places
        ]
    return (each for each in dtype_choices(room, model.config.n_layers) if ladder[-1] in each)


def _speed_planner(
    model: _Model,
    inventory: Inventory,
    workload: Workload,
    dtypes: tuple[ComputeDtype, ...] | None,
) -> PipelinesPlanner:
    every = places_of(inventory)
    given = dtypes or (model.dtype,) * len(every)
    seats = [
        (place, dtype)
        for place, dtype in zip(every, given, strict=True)
        if device_speed(place.device, dtype) is not None
    ]
    placing = Placing(
        model.config,
        model.index,
        inventory,
        workload,
        [place for place, _ in seats],
        [dtype for _, dtype in seats],
        kv_bytes=kv_bytes_of(model.weights, workload),
    )
    return PipelinesPlanner(placing)


def _told(
    plan: Plan,
    stored: ComputeDtype,
    index: TensorIndex,
    config: ModelConfig,
    inventory: Inventory,
    asked: Workload,
) -> Plan:
    """The plan with what was conceded, and with the nodes that the user left out."""
    concessions = []
    if plan.max_context_tokens < asked.max_context_tokens:
        weights = footprint(config, index, stored)
        whole, kept = (
            kv_bytes_of(weights, replace(asked, max_context_tokens=tokens)) * config.n_layers
            for tokens in (asked.max_context_tokens, plan.max_context_tokens)
        )
        concessions.append(
            Concession(
                knob="context",
                freed_bytes=whole - kept,
                text=f"context shortened from {asked.max_context_tokens} to "
                f"{plan.max_context_tokens} tokens, which frees {gigabytes(whole - kept)}: the "
                f"keys and values of {plan.max_concurrency} whole sequences do not fit",
            )
        )
    as_stored = footprint(config, index, stored).layer_bytes
    for dtype in sorted({stage.dtype for stage in plan.stages} - {stored}):
        held = footprint(config, index, dtype).layer_bytes
        lowered = [stage for stage in plan.stages if stage.dtype == dtype]
        saved = sum(
            as_stored[layer] - held[layer]
            for stage in lowered
            for layer in range(stage.first_layer, stage.end_layer)
        )
        who = f"{_stages_with(plan, dtype)} hold{'s' * (len(lowered) == 1)}"
        concessions.append(
            Concession(
                knob="dtype",
                freed_bytes=saved,
                text=f"{who} {dtype} in place of {stored}, which frees {gigabytes(saved)}: all in "
                f"{stored} do not fit",
            )
        )
    excluded = tuple(
        UnusedNode(host=wish.host, reason="excluded, as asked")
        for wish in asked.nodes
        if wish.exclude
    )
    unused = tuple(sorted((*plan.unused, *excluded), key=lambda node: node.name))
    return replace(plan, concessions=tuple(concessions), unused=unused)


def _stages_with(plan: Plan, dtype: ComputeDtype) -> str:
    said = []
    for number, pipeline in enumerate(plan.pipelines):
        lowered = [stage.index for stage in pipeline.stages if stage.dtype == dtype]
        of = f" of pipeline {number}" if len(plan.pipelines) > 1 else ""
        if lowered:
            said.append(f"stage{'s' * (len(lowered) > 1)} {id_ranges(lowered)}{of}")
    return " and ".join(said)


def _check(config: ModelConfig, inventory: Inventory, workload: Workload) -> None:
    if workload.num_stages is not None and not 1 <= workload.num_stages <= config.n_layers:
        raise UsageError(
            f"{workload.num_stages} stages for a model of {config.n_layers} layers; "
            f"ask for 1 to {config.n_layers}"
        )
    num_devices = sum(len(node.devices) for node in inventory.nodes)
    most = min(num_devices, workload.max_concurrency)
    if workload.num_pipelines is not None and not 1 <= workload.num_pipelines <= max(1, most):
        raise UsageError(
            f"{workload.num_pipelines} pipelines on {num_devices} device"
            f"{'s' * (num_devices != 1)} for {workload.max_concurrency} sequences at once; each "
            f"needs a device and a sequence of its own: ask for 1 to {max(1, most)}"
        )
    if workload.max_context_tokens < 1 or workload.max_concurrency < 1:
        raise UsageError(
            f"a context of {workload.max_context_tokens} tokens for "
            f"{workload.max_concurrency} sequences; both must be at least 1"
        )
    if not inventory.nodes:
        raise InfeasiblePlanError("there is no node to place the model on; start one")
