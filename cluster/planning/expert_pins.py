"""Experts that a user wants on certain nodes, whoever has their layers. Pure."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from ...errors import InfeasiblePlanError, UsageError
from ...fetcher.config import ModelConfig
from ...fetcher.only import Only
from ...fetcher.tensors import TensorIndex
from ..footprint import footprint, held_bytes
from ..machines import Inventory
from ..plan import ExpertHost, ExpertIds, Plan, StagePlan, UnusedNode
from ..search.place import MARGIN, Place
from ..units import gigabytes

Seat: TypeAlias = tuple[str, str]
"""Host and device."""
_Member = TypeVar("_Member", StagePlan, ExpertHost)
Holding: TypeAlias = dict[Seat, list[set[int]]]
"""Who holds which experts of each layer of a stage; the stage itself comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPin:
    """Experts for one node."""

    host: str
    layers: tuple[int, ...]
    experts: tuple[int, ...] | None = None
    """None: all of them."""
    is_copy: bool = False
    """Who holds them otherwise keeps them, and shares the work."""


def pin_experts(
    plan: Plan,
    pins: Sequence[ExpertPin],
    config: ModelConfig,
    index: TensorIndex,
    inventory: Inventory,
) -> Plan:
    """The plan with these experts on these nodes, as helpers of the stages with their layers.

    Of several pipelines a node helps the one that it has a part in, else the first. What was
    predicted of the plan does not hold any more, and is left out.

    Raises:
        UsageError: there is no such node, layer or expert.
        InfeasiblePlanError: a node lacks the memory.
    """
    if not pins:
        return plan
    places = {pin.host: _place(inventory, pin.host) for pin in pins}
    for pin in pins:
        ids = None if pin.experts is None else frozenset(pin.experts)
        Only(layers=frozenset(pin.layers), experts=ids).tensors(index)  # refuses what is not there
    helped = {
        pin.host: next((n for n, each in enumerate(plan.pipelines) if pin.host in each.hosts), 0)
        for pin in pins
    }
    changed = []
    for number, pipeline in enumerate(plan.pipelines):
        own = [pin for pin in pins if helped[pin.host] == number]
        stages = (
            _with_helpers(stage, _pinned(stage, own, places, config), config, index)
            for stage in pipeline.stages
        )
        changed.append(replace(pipeline, stages=tuple(stages)))
    pinned = replace(plan, pipelines=tuple(changed))
    pinned = replace(
        pinned,
        pipelines=tuple(replace(each, prediction=None) for each in pinned.pipelines),
        unused=tuple(_beside(idle) for idle in plan.unused if not _is_used(idle, pinned)),
        best_possible=None,
    )
    return _accounted(plan, pinned, inventory)


def _beside(idle: UnusedNode) -> UnusedNode:
    """What a plan with it would do was told of one without pinned experts."""
    if not idle.reason.startswith("not needed"):
        return idle
    return replace(idle, reason="not needed: the others hold the whole model")


def _is_used(idle: UnusedNode, plan: Plan) -> bool:
    if idle.device is None:
        return idle.host in plan.hosts
    return (idle.host, idle.device) in {(member.host, member.device) for member in _members(plan)}


def _each_stage(plan: Plan, change: Callable[[StagePlan], StagePlan]) -> Plan:
    pipelines = tuple(
        replace(each, stages=tuple(map(change, each.stages))) for each in plan.pipelines
    )
    return replace(plan, pipelines=pipelines)


def _place(inventory: Inventory, host: str) -> Place:
    """The device of a node for pinned experts: its largest accelerator, or its CPU."""
    for node in inventory.nodes:
        if node.host == host:
            device = max(node.devices, key=lambda dev: (dev.kind == "cuda", dev.memory_bytes))
            return Place(node=node, device=device)
    there = ", ".join(node.host for node in inventory.nodes)
    raise UsageError(f"experts are pinned to {host}, but the nodes are {there}")


def _pinned(
    stage: StagePlan,
    pins: Sequence[ExpertPin],
    places: Mapping[str, Place],
    config: ModelConfig,
) -> Holding:
    every = tuple(range(config.num_experts))
    num_layers = stage.end_layer - stage.first_layer
    own = stage.experts or (every,) * num_layers
    holding: Holding = {(stage.host, stage.device): [set(ids) for ids in own]}
    for helper in stage.helpers:
        holding[helper.host, helper.device] = [set(ids) for ids in helper.experts]
    for pin in pins:
        seat = (pin.host, places[pin.host].device_name)
        # A node that has a part already keeps to the device that it is on.
        seat = next((held for held in holding if held[0] == pin.host), seat)
        target = holding.setdefault(seat, [set() for _ in range(num_layers)])
        for row in range(num_layers):
            if stage.first_layer + row not in pin.layers:
                continue
            ids = set(every if pin.experts is None else pin.experts)
            for held in holding.values():
                if not pin.is_copy and held is not target:
                    held[row] -= ids
            target[row] |= ids
    return holding


def _with_helpers(
    stage: StagePlan, holding: Holding, config: ModelConfig, index: TensorIndex
) -> StagePlan:
    """The stage with that; memory and threads are still as before."""
    size_of = _expert_bytes(stage, index)

    def weight(experts: ExpertIds) -> int:
        return sum(size_of[layer, e] for layer, ids in _numbered(stage, experts) for e in ids)

    (_, own), *others = ((seat, tuple(map(_ascending, held))) for seat, held in holding.items())
    helpers = tuple(
        ExpertHost(
            host=host,
            device=device,
            num_threads=1,
            weights_bytes=weight(experts),
            free_bytes=0,
            workspace_bytes=footprint(config, index, stage.dtype).workspace_bytes(0),
            experts=experts,
        )
        for (host, device), experts in others
        if any(experts)
    )
    every = (tuple(range(config.num_experts)),) * len(own)
    return replace(
        stage,
        experts=own if helpers else None,
        helpers=helpers,
        weights_bytes=stage.weights_bytes + weight(own) - weight(stage.experts or every),
        step_s=None,
        hop_s=None,
    )


def _accounted(before: Plan, after: Plan, inventory: Inventory) -> Plan:
    """Free memory and threads of everything on every device, which share what there is."""
    nodes = {node.host: node for node in inventory.nodes}
    memory = {
        (place.node.host, place.device_name): place.device.memory_bytes
        for node in inventory.nodes
        for place in (Place(node=node, device=device) for device in node.devices)
    }
    free = dict(memory)
    free |= {(m.host, m.device): m.free_bytes for m in _members(before)}
    change: dict[Seat, int] = defaultdict(int)
    for sign, plan in ((-1, before), (1, after)):
        for member in _members(plan):
            is_helper = isinstance(member, ExpertHost)
            taken = member.weights_bytes + is_helper * member.workspace_bytes
            change[member.host, member.device] += sign * taken
    for seat, more in change.items():
        free[seat] -= more
        if more > 0 and free[seat] < memory[seat] * MARGIN:
            raise InfeasiblePlanError(
                f"the experts pinned to {seat[0]} take {gigabytes(more)} more of its {seat[1]}, "
                f"where {gigabytes(max(0, free[seat] + more))} of {gigabytes(memory[seat])} are "
                f"free and {MARGIN:.0%} stays free; pin fewer there"
            )
    num_members = Counter(member.host for member in _members(after))

    def accounted(member: _Member) -> _Member:
        return replace(
            member,
            free_bytes=free[member.host, member.device],
            num_threads=max(1, nodes[member.host].num_cpus // num_members[member.host]),
        )

    return _each_stage(
        after,
        lambda stage: replace(accounted(stage), helpers=tuple(map(accounted, stage.helpers))),
    )


def _members(plan: Plan) -> Iterator[StagePlan | ExpertHost]:
    for stage in plan.stages:
        yield stage
        yield from stage.helpers


def _expert_bytes(stage: StagePlan, index: TensorIndex) -> Mapping[tuple[int, int], int]:
    """By layer and expert, as the stage holds them."""
    found: Counter[tuple[int, int]] = Counter()
    for entry in index:
        path = entry.name.split(".")
        if path[2:4] == ["feed_forward", "experts"]:
            size = held_bytes(entry.name, entry.shape, stage.dtype)
            found[int(path[1]), int(path[4])] += size
    return found


def _numbered(stage: StagePlan, experts: ExpertIds) -> list[tuple[int, tuple[int, ...]]]:
    return list(enumerate(experts, start=stage.first_layer))


def _ascending(ids: set[int]) -> tuple[int, ...]:
    return tuple(sorted(ids))
