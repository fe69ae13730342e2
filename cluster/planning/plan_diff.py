"""What changes from one plan to another: which layers and experts move, and the bytes to fetch.

A device that a plan uses holds *units*: the attention of a layer, each of its experts, the two ends
of the model. A unit moves when the devices that hold it differ between the plans.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ...fetcher.tensors import TensorEntry, TensorIndex
from ..machines import Device, Inventory
from ..plan import Plan

_Place = tuple[str, str, str]
"""Host, device and dtype."""
_Unit = tuple[int, int | None]
"""A layer and one of its experts; None: the rest of the layer."""
_Places = tuple[tuple[_Place, ...], tuple[_Place, ...]]
"""Before and after."""
_Change = tuple[tuple[int, ...] | None, tuple[_Place, ...], tuple[_Place, ...]]
"""Experts, before and after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Consecutive layers, or the same experts of them, that change place or dtype together."""

    first_layer: int
    end_layer: int
    """One past the last layer."""
    experts: tuple[int, ...] | None
    """None: the layers, but for experts that are told by themselves or stay where they are."""
    before: tuple[str, ...]
    """``HOST DEVICE DTYPE`` of those that hold it; empty: nobody did."""
    after: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeChange:
    """What the change means for one node."""

    host: str
    gained_bytes: int
    """Of tensors, in the checkpoint's dtype, that it did not hold before: at most to be fetched."""
    dropped_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanDiff:
    """From the plan that runs to the one that would."""

    moves: tuple[Move, ...]
    nodes: tuple[NodeChange, ...]
    """Those that gain or drop something, by name."""
    settings: tuple[tuple[str, Any, Any], ...]
    """Name, before, after of what is neither place nor prediction."""
    predicted: tuple[tuple[str, float, float], ...]
    """Name, before, after, where both plans predict."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing would move or be set otherwise."""
        return not (self.moves or self.settings)


def plan_diff(before: Plan, after: Plan, index: TensorIndex) -> PlanDiff:
    """Compare two plans of one model; pure."""
    old, new = _holders(before, index), _holders(after, index)
    held_before, held_after = _held(old, index), _held(new, index)
    sizes = {entry.name: entry.num_bytes for entry in index}
    nodes = []
    for host in sorted(held_before.keys() | held_after.keys()):
        gained = held_after[host] - held_before[host]
        dropped = held_before[host] - held_after[host]
        if gained or dropped:
            nodes.append(
                NodeChange(
                    host=host,
                    gained_bytes=sum(sizes[name] for name in gained),
                    dropped_bytes=sum(sizes[name] for name in dropped),
                )
            )
    return PlanDiff(
        moves=tuple(_moves(old, new)),
        nodes=tuple(nodes),
        settings=tuple(_settings(before, after)),
        predicted=tuple(_predicted(before, after)),
    )


def needed_bytes(plan: Plan, index: TensorIndex) -> dict[str, int]:
    """Of every host of the plan, its tensors in the checkpoint's dtype."""
    sizes = {entry.name: entry.num_bytes for entry in index}
    held = _held(_holders(plan, index), index)
    return {host: sum(sizes[name] for name in held[host]) for host in plan.hosts}


def _holders(plan: Plan, index: TensorIndex) -> dict[_Unit, tuple[_Place, ...]]:
    experts = sorted({e for entry in index if (e := _unit(entry, -1)[1]) is not None})
    held: defaultdict[_Unit, tuple[_Place, ...]] = defaultdict(tuple)
    for stage in plan.stages:
        own = (stage.host, stage.device, stage.dtype)
        helpers = [(helper.host, helper.device, stage.dtype) for helper in stage.helpers]
        for layer in range(stage.first_layer, stage.end_layer):
            held[layer, None] += (own,)
            for expert in experts:
                held[layer, expert] += tuple(
                    own if number < 0 else helpers[number]
                    for number in stage.holders(layer, expert)
                )
        # The two ends of the model, as if they were layers before the first and after the last.
        if stage.has_embeddings:
            held[-1, None] += (own,)
        if stage.has_output:
            held[stage.end_layer, None] += (own,)
    return held


def _unit(entry: TensorEntry, num_layers: int) -> _Unit:
    """Where a tensor belongs; the embeddings to layer -1, norm and head to one past the last."""
    head, _, rest = entry.name.partition(".")
    if head != "layers":
        return (-1 if head == "tok_embeddings" else num_layers, None)
    layer, _, part = rest.partition(".")
    if part.startswith("feed_forward.experts."):
        return int(layer), int(part.split(".")[2])
    return int(layer), None


def _held(
    holders: Mapping[_Unit, tuple[_Place, ...]], index: TensorIndex
) -> defaultdict[str, set[str]]:
    """The tensors of every host."""
    num_layers = max(layer for layer, _ in holders)
    held: defaultdict[str, set[str]] = defaultdict(set)
    for entry in index:
        for host, _, _ in holders.get(_unit(entry, num_layers), ()):
            held[host].add(entry.name)
    return held


def _moves(
    old: Mapping[_Unit, tuple[_Place, ...]], new: Mapping[_Unit, tuple[_Place, ...]]
) -> Iterator[Move]:
    """What differs, with neighbouring layers that change alike as one move."""
    layers_of: defaultdict[_Change, list[int]] = defaultdict(list)
    for layer in sorted({layer for layer, expert in new if expert is None})[1:-1]:
        whole = old.get((layer, None), ()), new[layer, None]
        experts_of: defaultdict[_Places, list[int]] = defaultdict(list)
        for at, expert in new:
            places = old.get((at, expert), ()), new[at, expert]
            if at == layer and expert is not None and places != whole:
                experts_of[places].append(expert)
        layers_of[None, *whole].append(layer)
        for places, experts in experts_of.items():
            layers_of[tuple(experts), *places].append(layer)
    moves = [
        Move(
            first_layer=run[0],
            end_layer=run[-1] + 1,
            experts=experts,
            before=tuple(map(" ".join, was)),
            after=tuple(map(" ".join, now)),
        )
        for (experts, was, now), layers in layers_of.items()
        if was != now
        for run in _runs(layers)
    ]
    yield from sorted(moves, key=lambda move: (move.first_layer, move.experts or ()))


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Ascending numbers cut where one is missing."""
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        yield [number for _, number in run]


def with_memory_of(running: Plan, inventory: Inventory) -> Inventory:
    """The inventory as if what `running` holds were free: whoever plans anew may use it.

    A device that it does not use stays as it is.
    """
    held: defaultdict[tuple[str, str], int] = defaultdict(int)
    free: dict[tuple[str, str], int] = {}
    for stage in running.stages:
        taken = stage.weights_bytes + stage.kv_bytes + stage.workspace_bytes
        held[stage.host, stage.device] += taken
        free[stage.host, stage.device] = stage.free_bytes
        for helper in stage.helpers:
            held[helper.host, helper.device] += helper.weights_bytes + helper.workspace_bytes
            free[helper.host, helper.device] = helper.free_bytes

    def freed(host: str, device: Device) -> Device:
        place = (host, "cpu" if device.kind == "cpu" else f"{device.kind}:{device.index}")
        before = free.get(place, 0) + held[place]
        return replace(device, memory_bytes=max(device.memory_bytes, before))

    nodes = (
        replace(node, devices=tuple(freed(node.host, device) for device in node.devices))
        for node in inventory.nodes
    )
    return replace(inventory, nodes=tuple(nodes))


def _settings(before: Plan, after: Plan) -> Iterator[tuple[str, Any, Any]]:
    if len(before.pipelines) != len(after.pipelines):
        yield "num_pipelines", len(before.pipelines), len(after.pipelines)
    if len(before.stages) != len(after.stages):
        yield "num_stages", len(before.stages), len(after.stages)
    for name in ("max_context_tokens", "max_concurrency", "num_kv_blocks"):
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            yield name, was, now


def _predicted(before: Plan, after: Plan) -> Iterator[tuple[str, float, float]]:
    if before.prediction is None or after.prediction is None:
        return
    for name in ("tokens_per_s", "stream_tokens_per_s"):
        yield name, getattr(before.prediction, name), getattr(after.prediction, name)
