"""Place a model by memory alone: whole layers, balanced by bytes, on as few devices as fit.

There is one pipeline, or as many as are asked for: then devices are dealt out, the largest first,
each to whoever has least memory so far.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ...settings import KV_BLOCK_TOKENS
from ..footprint import Footprint
from ..machines import ComputeDtype, Inventory
from ..plan import Pipeline, StagePlan, UnusedNode, Workload
from ..search.place import Place, Seating
from ..units import gigabytes
from .partition import Seat, partition


def num_kv_blocks(workload: Workload) -> int:
    return workload.max_concurrency * -(-workload.max_context_tokens // KV_BLOCK_TOKENS)


def kv_bytes_of(weights: Footprint, workload: Workload) -> int:
    """Of one layer."""
    return num_kv_blocks(workload) * KV_BLOCK_TOKENS * weights.kv_bytes_per_token


def _layer_costs(weights: Footprint) -> list[int]:
    """Bytes of each layer; the ends of the model go with the first and the last one."""
    costs = list(weights.layer_bytes)
    costs[0] += weights.embeddings_bytes
    costs[-1] += weights.output_bytes
    return costs


_Placed = tuple[Seating, tuple[int, ...], Workload]
"""Who has stages, the end layer of each, and what the pipeline must be able to do."""


def pipelines_by_memory(
    weights: Footprint, inventory: Inventory, workload: Workload, dtype: ComputeDtype
) -> tuple[Pipeline, ...] | None:
    """The pipelines that the workload asks for, one if it does not say; None: they do not fit."""
    found = _placed(weights, inventory, workload)
    if found is None:
        return None
    seats = {(p.node.host, p.device_name) for seating, _, _ in found for p, _ in seating}
    on_host = Counter(host for host, _ in seats)
    return tuple(
        Pipeline(
            stages=_stages(weights, seating, ends, wishes, dtype, on_host),
            num_kv_blocks=num_kv_blocks(wishes),
            max_concurrency=wishes.max_concurrency,
        )
        for seating, ends, wishes in found
    )


def _placed(weights: Footprint, inventory: Inventory, workload: Workload) -> list[_Placed] | None:
    count = workload.num_pipelines or 1
    if count == 1:
        alone = _place(weights, inventory, workload)
        return None if alone is None else [(*alone, workload)]
    least, more = divmod(workload.max_concurrency, count)
    wishes = [replace(workload, max_concurrency=least + (n < more)) for n in range(count)]
    for pool in _place_pools(inventory) if least else ():
        groups: list[list[Place]] = [[] for _ in range(count)]
        for place in _orders(pool)[-1]:
            min(groups, key=lambda group: sum(each.usable_bytes for each in group)).append(place)
        placed: list[_Placed] = []
        for group, wish in zip(groups, wishes, strict=True):
            found = _place(weights, _with_places(inventory, group), wish)
            if found is None:
                break
            placed.append((*found, wish))
        if len(placed) == count:
            return placed
    return None


def _with_places(inventory: Inventory, places: Sequence[Place]) -> Inventory:
    """With these devices alone."""
    nodes = {place.node.host: place.node for place in places}
    kept = (
        replace(node, devices=tuple(p.device for p in places if p.node is node))
        for node in nodes.values()
    )
    return replace(inventory, nodes=tuple(kept))


def _place(
    weights: Footprint, inventory: Inventory, workload: Workload
) -> tuple[Seating, tuple[int, ...]] | None:
    """The first seating in order of preference that fits, with the end layer of every stage."""
    costs = _layer_costs(weights)
    needs = [cost + kv_bytes_of(weights, workload) for cost in costs]
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


def shorten(
    weights: Footprint, inventory: Inventory, workload: Workload, floor: int
) -> Workload | None:
    """The wish with the longest context, in whole KV blocks, that can be placed."""
    low, high = -(-floor // KV_BLOCK_TOKENS), workload.max_context_tokens // KV_BLOCK_TOKENS
    longest: Workload | None = None
    while low <= high:
        middle = (low + high) // 2
        shorter = replace(workload, max_context_tokens=middle * KV_BLOCK_TOKENS)
        if _placed(weights, inventory, shorter) is None:
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
    on_host: Mapping[str, int],
) -> tuple[StagePlan, ...]:
    """`on_host` says how many devices of a host have stages, which share its processors."""
    costs = _layer_costs(weights)
    kv_bytes = kv_bytes_of(weights, workload)
    overhead = weights.workspace_bytes(workload.max_context_tokens)
    seats = [place for place, count in seating for _ in range(count)]
    starts = (0, *ends[:-1])
    taken: dict[tuple[str, str], int] = {}
    for place, start, end in zip(seats, starts, ends, strict=True):
        device = (place.node.host, place.device_name)
        used = sum(costs[start:end]) + (end - start) * kv_bytes + overhead
        taken[device] = taken.get(device, 0) + used
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
            # Stages of one device take turns, see `Pipeline.steps_at_once`.
            num_threads=max(1, place.node.num_cpus // on_host[place.node.host]),
            weights_bytes=sum(costs[start:end]),
            kv_bytes=(end - start) * kv_bytes,
            free_bytes=place.device.memory_bytes - taken[place.node.host, place.device_name],
            workspace_bytes=overhead,
        )
        for number, (place, start, end) in enumerate(zip(seats, starts, ends, strict=True))
    )


def smallest_stage_bytes(weights: Footprint, workload: Workload) -> int:
    """Of a stage with one layer."""
    return (
        min(weights.layer_bytes)
        + kv_bytes_of(weights, workload)
        + weights.workspace_bytes(workload.max_context_tokens)
    )


def unused_by_memory(
    weights: Footprint, inventory: Inventory, workload: Workload, pipelines: Sequence[Pipeline]
) -> tuple[UnusedNode, ...]:
    """Why nodes, and devices of nodes with a part in `pipelines`, have none."""
    stages = [stage for pipeline in pipelines for stage in pipeline.stages]
    used = {stage.host for stage in stages}
    seats = {(stage.host, stage.device) for stage in stages}
    smallest = smallest_stage_bytes(weights, workload)
    whole = "all pipelines" if (workload.num_pipelines or 1) > 1 else "the whole model"

    def reason(usable: int, others: Sequence[str]) -> str:
        if usable < smallest:
            return f"too small: {gigabytes(usable)} usable, one layer takes {gigabytes(smallest)}"
        return f"not needed: {', '.join(others)} hold{'s' * (len(others) == 1)} {whole}"

    reasons = []
    for node in inventory.nodes:
        rooms = {
            p.device_name: p.usable_bytes
            for p in (Place(node=node, device=d) for d in node.devices)
        }
        if node.host not in used:
            told = reason(max(rooms.values(), default=0), sorted(used))
            reasons.append(UnusedNode(host=node.host, reason=told))
            continue
        names = sorted(f"{host} {device}" for host, device in seats)
        reasons += [
            UnusedNode(host=node.host, device=device, reason=reason(room, names))
            for device, room in rooms.items()
            if (node.host, device) not in seats
        ]
    return tuple(reasons)
