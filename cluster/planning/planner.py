"""Place a model on machines: a pure function from weights, machines and wishes to a plan.

Whole layers, consecutive stages, every byte counted on the device that holds it. Where the speeds
of all nodes are known, the search of `speed_plan.py` decides. Otherwise stages are balanced by
bytes, not by memory size: a large memory is not a fast one.
"""

from dataclasses import replace
from functools import partial

from ...errors import InfeasiblePlanError, UsageError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ..footprint import stored_dtype
from ..machines import ComputeDtype, Inventory
from ..plan import Objective, Plan, UnusedNode, Workload
from ..search.place import MARGIN, places_of
from ..search.weighed import WeighedModel
from ..units import gigabytes
from .concessions import conceded
from .dtype_ladder import lower_dtypes
from .memory_plan import shorten
from .node_wishes import without_limits
from .placement import Placement, without_times
from .popularity import popularity_of
from .refusal import pins_refused, refused
from .soundness import check_inventory
from .speed_plan import speeds_known

__all__ = ["MARGIN", "gigabytes", "plan", "predicted"]


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
    stored, model = workload.dtype or stored_dtype(index), WeighedModel(config, index)
    ladder = (stored,) if workload.dtype else (stored, *lower_dtypes(stored))
    for rung in range(len(ladder)):
        placement = Placement(model, ladder[: rung + 1])
        found = placement.best(allowed, wanted)
        if found is None and workload.min_context_tokens is not None:
            floor = workload.min_context_tokens
            # Whole layers alone may not fit at any length, and experts apart still do.
            shorter = shorten(placement.weights, allowed, wanted, floor) or replace(
                wanted, max_context_tokens=floor
            )
            found = placement.best(allowed, shorter)
        if found is not None:
            return _told(found, model, stored, workload)
    said = (config, index, ladder[-1], allowed, wanted, partial(_is_possible, model))
    if wanted.nodes and Placement(model, ladder).is_possible(allowed, replace(wanted, nodes=())):
        raise pins_refused(*said)
    raise refused(*said)


def can_plan(
    config: ModelConfig, index: TensorIndex, inventory: Inventory, workload: Workload
) -> bool:
    """Whether there is a plan with all layers in the dtype of the workload and with its whole
    context; `inventory` and `workload` are as `without_limits` leaves them."""
    return _is_possible(WeighedModel(config, index), inventory, workload)


def _is_possible(model: WeighedModel, inventory: Inventory, workload: Workload) -> bool:
    # All that decides is memory, and one stream is the least to look through.
    objective: Objective = "fit" if workload.objective == "fit" else "latency"
    dtype = workload.dtype or stored_dtype(model.index)
    asked = replace(workload, objective=objective)
    return Placement(model, (dtype,)).is_possible(inventory, asked)


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
    if workload.popularity is None and any(stage.helpers for stage in plan.stages):
        # Its experts need not lie as they would in a plan that was made here.
        workload = replace(workload, popularity=popularity_of({}, config))
    dtype = workload.dtype or stored_dtype(index)
    if not speeds_known(inventory, dtype):
        return without_times(plan)
    dtype_of = {}
    for stage in plan.stages:
        dtype_of[stage.host, stage.device] = stage.dtype
        dtype_of |= {(helper.host, helper.device): stage.dtype for helper in stage.helpers}
    dtypes = tuple(
        dtype_of.get((place.node.host, place.device_name), dtype) for place in places_of(inventory)
    )
    placement = Placement(WeighedModel(config, index), (dtype,))
    return placement.planner(inventory, workload, dtypes).predicted(plan)


def _told(plan: Plan, model: WeighedModel, stored: ComputeDtype, asked: Workload) -> Plan:
    """The plan with what was conceded, and with the nodes that the user left out."""
    excluded = tuple(
        UnusedNode(host=wish.host, reason="excluded, as asked")
        for wish in asked.nodes
        if wish.exclude
    )
    unused = tuple(sorted((*plan.unused, *excluded), key=lambda node: node.name))
    return replace(plan, concessions=conceded(plan, model, stored, asked), unused=unused)


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
