"""Place a model on machines: a pure function from weights, machines and wishes to a plan.

Whole layers, consecutive stages, every byte counted on the device that holds it. Where the speeds
of all nodes are known, the search of `speed_plan.py` decides. Otherwise stages are balanced by
bytes, not by memory size: a large memory is not a fast one.
"""

from collections.abc import Iterator
from dataclasses import replace

from ..errors import InfeasiblePlanError, UsageError
from ..fetcher.config import ModelConfig
from ..fetcher.tensors import TensorIndex
from ..settings import KV_BLOCK_TOKENS
from .advice import sufficient_changes
from .footprint import Footprint, footprint, stored_dtype
from .partition import Seat, partition
from .place import MARGIN, Place, Seating
from .plan import (
    ComputeDtype,
    Inventory,
    Plan,
    StagePlan,
    UnusedNode,
    Workload,
)
from .speed_plan import SpeedPlanner, speeds_known
from .units import gigabytes

__all__ = ["MARGIN", "gigabytes", "plan"]


def plan(config: ModelConfig, index: TensorIndex, inventory: Inventory, workload: Workload) -> Plan:
    """Place every layer of the model.

    Where all speeds are known, the placement that decodes fastest under the cost model, for the
    objective of the workload. Otherwise, or for the objective ``fit``: as few devices as fit
    (accelerators first), or the number of stages asked for, spread over as many devices as there
    are; nodes that hold bytes of the release already come first, then those with more memory.

    Where the keys and values of the wished context do not fit on all devices
    together, the context shrinks down to ``workload.min_context_tokens`` and a note says so.

    Raises:
        UsageError: the wishes make no sense, e.g. more stages than layers.
        InfeasiblePlanError: no placement fits; the message has the numbers per node.
    """
    _check(config, inventory, workload)
    dtype = workload.dtype or stored_dtype(index)
    weights = footprint(config, index, dtype)
    speed = _speed_planner(config, index, weights, inventory, workload, dtype)
    found = (speed and speed.seating()) or _place(weights, inventory, workload)
    notes: tuple[str, ...] = ()
    if found is None and workload.min_context_tokens is not None:
        shorter = _shorten(weights, inventory, workload, workload.min_context_tokens)
        if shorter is not None:
            notes = (
                f"context shortened from {workload.max_context_tokens} to "
                f"{shorter.max_context_tokens} tokens, so that the keys and values of "
                f"{shorter.max_concurrency} sequences fit",
            )
            workload = shorter
            speed = _speed_planner(config, index, weights, inventory, workload, dtype)
            found = (speed and speed.seating()) or _place(weights, inventory, workload)
    if found is None:
        raise InfeasiblePlanError(_why_not(config, index, dtype, inventory, workload))
    seating, ends = found
    placed = Plan(
        stages=_stages(weights, seating, ends, workload, dtype),
        num_kv_blocks=_num_kv_blocks(workload),
        max_context_tokens=workload.max_context_tokens,
        max_concurrency=workload.max_concurrency,
        unused=_unused(weights, inventory, workload, seating),
        notes=notes,
    )
    if speed is None:
        return placed
    placed = speed.predicted(placed)
    if placed.prediction is None:
        return placed
    return replace(placed, unused=speed.unused(placed, _smallest_bytes(weights, workload)))


def _speed_planner(
    config: ModelConfig,
    index: TensorIndex,
    weights: Footprint,
    inventory: Inventory,
    workload: Workload,
    dtype: ComputeDtype,
) -> SpeedPlanner | None:
    if workload.objective == "fit" or not speeds_known(inventory, dtype):
        return None
    kv_bytes = _kv_bytes(weights, workload)
    return SpeedPlanner(config, index, inventory, workload, dtype, kv_bytes=kv_bytes)


def _check(config: ModelConfig, inventory: Inventory, workload: Workload) -> None:
    if workload.num_stages is not None and not 1 <= workload.num_stages <= config.n_layers:
        raise UsageError(
            f"{workload.num_stages} stages for a model of {config.n_layers} layers; "
            f"ask for 1 to {config.n_layers}"
        )
    if workload.max_context_tokens < 1 or workload.max_concurrency < 1:
        raise UsageError(
            f"a context of {workload.max_context_tokens} tokens for "
            f"{workload.max_concurrency} sequences; both must be at least 1"
        )
    if not inventory.nodes:
        raise InfeasiblePlanError("there is no node to place the model on; start one")


def _num_kv_blocks(workload: Workload) -> int:
    return workload.max_concurrency * -(-workload.max_context_tokens // KV_BLOCK_TOKENS)


def _kv_bytes(weights: Footprint, workload: Workload) -> int:
    """Of one layer."""
    return _num_kv_blocks(workload) * KV_BLOCK_TOKENS * weights.kv_bytes_per_token


def _layer_costs(weights: Footprint) -> list[int]:
    """Bytes of each layer; the ends of the model go with the first and the last one."""
    costs = list(weights.layer_bytes)
    costs[0] += weights.embeddings_bytes
    costs[-1] += weights.output_bytes
    return costs


def _place(
    weights: Footprint, inventory: Inventory, workload: Workload
) -> tuple[Seating, tuple[int, ...]] | None:
    """The first seating in order of preference that fits, with the end layer of every stage."""
    costs = _layer_costs(weights)
    needs = [cost + _kv_bytes(weights, workload) for cost in costs]
    overhead = weights.workspace_bytes(workload.max_context_tokens)
    for seating in _seatings(inventory, workload.num_stages, len(costs)):
        seats = [
            Seat(num_stages=count, capacity=place.usable_bytes - count * overhead)
            for place, count in seating
        ]
        if sum(seat.capacity for seat in seats) < sum(needs):
            continue
        if ends := partition(costs, needs, seats):
            return seating, ends
    return None


def _shorten(
    weights: Footprint, inventory: Inventory, workload: Workload, floor: int
) -> Workload | None:
    """The wish with the longest context, in whole KV blocks, that can be placed."""
    low, high = -(-floor // KV_BLOCK_TOKENS), workload.max_context_tokens // KV_BLOCK_TOKENS
    longest: Workload | None = None
    while low <= high:
        middle = (low + high) // 2
        shorter = replace(workload, max_context_tokens=middle * KV_BLOCK_TOKENS)
        if _place(weights, inventory, shorter) is None:
            high = middle - 1
        else:
            longest, low = shorter, middle + 1
    return longest


def _seatings(inventory: Inventory, num_stages: int | None, num_layers: int) -> Iterator[Seating]:
    """Ways to seat the stages, best first."""
    for places in _place_pools(inventory):
        orders = _orders(places)
        if num_stages is None:
            for count in range(1, min(len(places), num_layers) + 1):
                yield from (tuple((place, 1) for place in order[:count]) for order in orders)
        else:
            for count in range(min(len(places), num_stages), 0, -1):
                yield from (_spread(order[:count], num_stages) for order in orders)


def _place_pools(inventory: Inventory) -> Iterator[tuple[Place, ...]]:
    """Accelerators and the CPUs of nodes without one; then, if that differs, every device."""
    every = tuple(Place(node=node, device=dev) for node in inventory.nodes for dev in node.devices)
    with_cuda = {place.node.host for place in every if place.device.kind == "cuda"}
    fast = tuple(p for p in every if p.device.kind == "cuda" or p.node.host not in with_cuda)
    yield fast
    if fast != every:
        yield every


def _orders(places: tuple[Place, ...]) -> tuple[tuple[Place, ...], ...]:
    """Bytes held first, then memory; then by memory alone, for when the former do not fit."""

    def key(place: Place) -> tuple[int, str, str]:
        return (-place.usable_bytes, place.node.host, place.device_name)

    by_memory = tuple(sorted(places, key=key))
    by_held = tuple(sorted(by_memory, key=lambda place: -place.node.held_bytes))
    return (by_held,) if by_held == by_memory else (by_held, by_memory)


def _spread(places: tuple[Place, ...], num_stages: int) -> Seating:
    """At least one stage each, the others in proportion to memory, always to the neediest."""
    counts = [1] * len(places)
    for _ in range(num_stages - len(places)):
        room = [
            place.usable_bytes / (count + 1) for place, count in zip(places, counts, strict=True)
        ]
        counts[room.index(max(room))] += 1
    return tuple(zip(places, counts, strict=True))


def _stages(
    weights: Footprint,
    seating: Seating,
    ends: tuple[int, ...],
    workload: Workload,
    dtype: ComputeDtype,
) -> tuple[StagePlan, ...]:
    costs = _layer_costs(weights)
    kv_bytes = _kv_bytes(weights, workload)
    overhead = weights.workspace_bytes(workload.max_context_tokens)
    seats = [place for place, count in seating for _ in range(count)]
    starts = (0, *ends[:-1])
    taken: dict[tuple[str, str], int] = {}
    stages_of_host: dict[str, int] = {}
    for place, start, end in zip(seats, starts, ends, strict=True):
        device = (place.node.host, place.device_name)
        used = sum(costs[start:end]) + (end - start) * kv_bytes + overhead
        taken[device] = taken.get(device, 0) + used
        stages_of_host[place.node.host] = stages_of_host.get(place.node.host, 0) + 1
    return tuple(
        StagePlan(
            index=number,
            host=place.node.host,
            device=place.device_name,
            first_layer=start,
            end_layer=end,
            has_embeddings=number == 0,
            has_output=number == len(ends) - 1,
            dtype=dtype,
            num_threads=max(1, place.node.num_cpus // stages_of_host[place.node.host]),
            weights_bytes=sum(costs[start:end]),
            kv_bytes=(end - start) * kv_bytes,
            free_bytes=place.device.memory_bytes - taken[place.node.host, place.device_name],
        )
        for number, (place, start, end) in enumerate(zip(seats, starts, ends, strict=True))
    )


def _smallest_bytes(weights: Footprint, workload: Workload) -> int:
    """Of a stage with one layer."""
    return (
        min(weights.layer_bytes)
        + _kv_bytes(weights, workload)
        + weights.workspace_bytes(workload.max_context_tokens)
    )


def _unused(
    weights: Footprint, inventory: Inventory, workload: Workload, seating: Seating
) -> tuple[UnusedNode, ...]:
    used = {place.node.host for place, _ in seating}
    smallest = _smallest_bytes(weights, workload)
    reasons = []
    for node in inventory.nodes:
        if node.host in used:
            continue
        usable = max((Place(node=node, device=dev).usable_bytes for dev in node.devices), default=0)
        if usable < smallest:
            reason = f"too small: {gigabytes(usable)} usable, one layer takes {gigabytes(smallest)}"
        else:
            others = ", ".join(sorted(used))
            reason = f"not needed: {others} hold{'s' * (len(used) == 1)} the whole model"
        reasons.append(UnusedNode(host=node.host, reason=reason))
    return tuple(reasons)


def _why_not(
    config: ModelConfig,
    index: TensorIndex,
    dtype: ComputeDtype,
    inventory: Inventory,
    workload: Workload,
) -> str:
    weights = footprint(config, index, dtype)
    context = workload.min_context_tokens or workload.max_context_tokens
    least = replace(workload, max_context_tokens=min(context, workload.max_context_tokens))
    kv_bytes = _kv_bytes(weights, least) * len(weights.layer_bytes)
    overhead = weights.workspace_bytes(least.max_context_tokens) * (workload.num_stages or 1)
    needed = weights.weights_bytes + kv_bytes + overhead
    there = ", ".join(
        f"{node.host} {gigabytes(int(device.memory_bytes * (1 - MARGIN)))} of "
        f"{gigabytes(device.memory_bytes)} {device.kind}"
        for node in inventory.nodes
        for device in node.devices
    )
    stages = f" in {workload.num_stages} stages" if workload.num_stages else ""
    changes = "; ".join(
        change.text for change in sufficient_changes(config, index, inventory, least, dtype)
    )
    return (
        f"the model does not fit{stages}: it needs at least {gigabytes(needed)} "
        f"({gigabytes(weights.weights_bytes)} of {dtype} weights, {gigabytes(kv_bytes)} for the "
        f"keys and values of {least.max_concurrency} sequences of {least.max_context_tokens} "
        f"tokens, {gigabytes(overhead)} of workspace); usable ({MARGIN:.0%} stays free): {there}; "
        f"add memory or nodes, or ask for less; any one of these is enough: {changes}"
    )
