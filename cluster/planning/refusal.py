"""Why no plan is possible, and what would be enough: one sentence, then short lines."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace

from ...errors import InfeasiblePlanError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ..footprint import Footprint, footprint, stored_dtype
from ..machines import ComputeDtype, Inventory
from ..plan import Workload
from ..search.place import MARGIN, places_of
from ..units import gigabytes
from .advice import CanPlan, Change, sufficient_changes
from .memory_plan import kv_bytes_of, smallest_stage_bytes

_MOST_LINES = 8
"""Of devices; more of them are counted."""
_WIDTH = 80
"""Of a line, up to which nodes with the same device are named; more of them are counted."""


def refused(
    config: ModelConfig,
    index: TensorIndex,
    dtype: ComputeDtype,
    inventory: Inventory,
    workload: Workload,
    can_plan: CanPlan,
) -> InfeasiblePlanError:
    """The model does not fit: what it needs, what there is, and every change that suffices.

    `dtype` is the one that was asked for, or the last that was tried; `inventory` and `workload`
    are as `without_limits` leaves them; `can_plan` as of `sufficient_changes`.
    """
    weights, stored = footprint(config, index, dtype), stored_dtype(index)
    context = workload.min_context_tokens or workload.max_context_tokens
    least = replace(workload, max_context_tokens=min(context, workload.max_context_tokens))
    times = workload.num_pipelines or 1
    kv_bytes = kv_bytes_of(weights, least) * len(weights.layer_bytes)
    num_stages = times * (workload.num_stages or 1)
    workspace = weights.workspace_bytes(least.max_context_tokens) * num_stages
    held = times * weights.weights_bytes
    changes = sufficient_changes(config, index, inventory, least, dtype, can_plan)
    as_stored = ""
    if dtype != stored:
        whole = footprint(config, index, stored).weights_bytes
        as_stored = f" ({gigabytes(times * whole)} as they are stored, in {stored})"
    lines = [
        *_headline(weights, held + kv_bytes + workspace, inventory, least),
        f"  needed: {gigabytes(held)} of {dtype} weights{as_stored}",
        f"    {gigabytes(kv_bytes)} for the keys and values of "
        f"{least.max_concurrency} sequences of {least.max_context_tokens} tokens",
        f"    {gigabytes(workspace)} of workspace",
        f"  usable ({MARGIN:.0%} stays free):",
        *_devices(inventory),
        *_enough(changes),
    ]
    return _error(lines, changes)


def _enough(changes: Sequence[Change]) -> list[str]:
    if not changes:
        return ["  no single change is enough: add nodes, and ask for less"]
    told = [f"    {change.text}" for change in changes]
    return ["  any one of these is enough, the cheapest first:", *told]


def _error(lines: Sequence[str], changes: Sequence[Change]) -> InfeasiblePlanError:
    return InfeasiblePlanError("\n".join(lines), changes=[asdict(change) for change in changes])


def _headline(
    weights: Footprint, needed: int, inventory: Inventory, workload: Workload
) -> list[str]:
    usable = [place.usable_bytes for place in places_of(inventory)]
    stages = f" in {workload.num_stages} stages" if workload.num_stages else ""
    if (workload.num_pipelines or 1) > 1:
        stages += f" {workload.num_pipelines} times"
    smallest = smallest_stage_bytes(weights, workload)
    if max(usable) < smallest:
        return [
            f"the model does not fit{stages}: no node has room for one layer",
            f"  one layer: {gigabytes(smallest)}, the largest device: {gigabytes(max(usable))}",
        ]
    whole = " (whole layers do not fill them)" if sum(usable) >= needed else ""
    return [
        f"the model does not fit{stages}: it needs {gigabytes(needed)}, and "
        f"{gigabytes(sum(usable))} can be used{whole}"
    ]


def _devices(inventory: Inventory) -> list[str]:
    """A line for all devices that are alike, of the first kinds."""
    hosts_of: defaultdict[tuple[str, int, int], Counter[str]] = defaultdict(Counter)
    for place in places_of(inventory):
        device = place.device
        hosts_of[device.kind, device.memory_bytes, place.usable_bytes][place.node.host] += 1
    lines = []
    for (kind, memory, usable), hosts in hosts_of.items():
        names = [f"{count} on {host}" if count > 1 else host for host, count in hosts.items()]
        each = " each" * (hosts.total() > 1)
        what = f"    {gigabytes(usable)} of {gigabytes(memory)} {kind}{each}: "
        lines.append(
            next(
                line
                for shown in range(len(names), 0, -1)
                if len(line := what + _listed(names, shown)) <= _WIDTH or shown == 1
            )
        )
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"    and {len(lines) - _MOST_LINES} other kinds of devices"]
    return lines


def _listed(names: Sequence[str], shown: int) -> str:
    more = f" and {len(names) - shown} more" if shown < len(names) else ""
    return ", ".join(names[:shown]) + more


def pins_refused(
    config: ModelConfig,
    index: TensorIndex,
    dtype: ComputeDtype,
    inventory: Inventory,
    workload: Workload,
    can_plan: CanPlan,
) -> InfeasiblePlanError:
    """What each pin needs, and what would be enough; without pins the model fits. The arguments
    are those of `refused`."""
    weights = footprint(config, index, dtype)
    changes = sufficient_changes(config, index, inventory, workload, dtype, can_plan)
    lines = ["the pins leave no placement, and without them the model fits:"]
    room = {
        node.host: max(int(each.memory_bytes * (1 - MARGIN)) for each in node.devices)
        for node in inventory.nodes
    }
    overhead = weights.workspace_bytes(workload.max_context_tokens)
    for wish in workload.nodes:
        if wish.layers is not None:
            first, end = wish.layers
            need = sum(weights.layer_bytes[first:end]) + overhead
            need += (end - first) * kv_bytes_of(weights, workload)
            need += (first == 0) * weights.embeddings_bytes
            need += (end == len(weights.layer_bytes)) * weights.output_bytes
            lines.append(
                f"  layers {first}-{end - 1} on {wish.host} need {gigabytes(need)}, "
                f"{gigabytes(room[wish.host])} can be used there"
            )
    lines.append("  pin fewer layers there, or leave layers to nodes without a pin")
    return _error([*lines, *(_enough(changes) if changes else ())], changes)
