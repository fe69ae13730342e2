"""The best placement of one model at one lowest dtype, or whether there is any."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from ..footprint import Footprint
from ..machines import ComputeDtype, Inventory
from ..plan import Plan, StagePlan, UnusedNode, Workload, check_experts
from ..search.cost import device_speed
from ..search.place import places_of
from ..search.placing import Placing
from ..search.weighed import WeighedModel
from .dtype_ladder import dtype_choices
from .memory_plan import (
    kv_bytes_of,
    pipelines_by_memory,
    smallest_stage_bytes,
    unused_by_memory,
)
from .pipelines_plan import PipelinesPlanner
from .speed_plan import speeds_known

_ALIKE_GBPS = 100.0
"""What every device is taken to read where nobody knows and pins leave something to choose."""


@dataclass(frozen=True)
class Placement:
    """A model that is held in the dtypes of a ladder, the last of them on some device."""

    model: WeighedModel
    ladder: tuple[ComputeDtype, ...]

    @property
    def dtype(self) -> ComputeDtype:
        """The lowest."""
        return self.ladder[-1]

    @cached_property
    def weights(self) -> Footprint:
        """All in that."""
        return self.model.footprint(self.dtype)

    def best(self, inventory: Inventory, workload: Workload) -> Plan | None:
        """The best plan; None: nothing fits."""
        has_pins, are_known = _has_pins(workload), speeds_known(inventory, self.dtype)
        if has_pins and not are_known:
            return self._with_pins_alone(inventory, workload)
        if workload.objective != "fit" and are_known:
            choices = list(self._choices(inventory, workload))
            for dtypes in choices:
                fast = self.planner(inventory, workload, dtypes)
                # Of many choices most do not fit, which is soon seen.
                if (len(choices) == 1 or fast.is_possible) and fast.found:
                    return self._by_speed(fast, inventory, workload)
            if has_pins:
                return None
        weights = self.weights
        pipelines = pipelines_by_memory(weights, inventory, workload, self.dtype)
        if pipelines is None:
            return None
        placed = Plan(
            pipelines=pipelines,
            max_context_tokens=workload.max_context_tokens,
            unused=unused_by_memory(weights, inventory, workload, pipelines),
        )
        return self.planner(inventory, workload, None).predicted(placed) if are_known else placed

    def is_possible(self, inventory: Inventory, workload: Workload) -> bool:
        """Whether `best` finds one."""
        has_pins, are_known = _has_pins(workload), speeds_known(inventory, self.dtype)
        if has_pins and not are_known:
            inventory, workload = _alike(inventory), replace(workload, objective="latency")
            are_known = True
        # What memory says alone is said soonest.
        if not has_pins and pipelines_by_memory(self.weights, inventory, workload, self.dtype):
            return True
        return (workload.objective != "fit" and are_known) and any(
            self.planner(inventory, workload, dtypes).is_possible
            for dtypes in self._choices(inventory, workload)
        )

    def _by_speed(self, fast: PipelinesPlanner, inventory: Inventory, workload: Workload) -> Plan:
        placed = Plan(
            pipelines=fast.pipelines({node.host: node.num_cpus for node in inventory.nodes}),
            max_context_tokens=workload.max_context_tokens,
        )
        check_experts(placed, self.model.config.num_experts)
        if placed.prediction is not None:
            placed = replace(placed, best_possible=fast.best_possible())
        smallest = smallest_stage_bytes(self.weights, workload)
        return replace(placed, unused=fast.unused(placed.pipelines, smallest))

    def _with_pins_alone(self, inventory: Inventory, workload: Workload) -> Plan | None:
        """Pins where speeds are unknown: the search with all devices alike, and no predictions."""
        plan = self.best(_alike(inventory), replace(workload, objective="latency"))
        if plan is None:
            return None
        plan = without_times(plan)
        pipelines = tuple(replace(each, num_micro_batches=None) for each in plan.pipelines)
        unused = tuple(
            UnusedNode(host=node.host, reason="not needed: the others hold the whole model")
            for node in inventory.nodes
            if node.host not in plan.hosts
        )
        return replace(plan, pipelines=pipelines, unused=unused)

    def _choices(
        self, inventory: Inventory, workload: Workload
    ) -> Iterable[tuple[ComputeDtype, ...]]:
        """A dtype for every place, the least loss first, the last rung of the ladder alone."""
        places = places_of(inventory)
        if len(self.ladder) == 1:
            return [(self.dtype,) * len(places)]
        room = {}
        for dtype in self.ladder[-2:]:
            weights = self.model.footprint(dtype)
            layer = max(weights.layer_bytes) + kv_bytes_of(weights, workload)
            overhead = weights.workspace_bytes(workload.max_context_tokens)
            room[dtype] = [
                max(0, place.usable_bytes - overhead) // layer + workload.separate_experts
                for place in places
            ]
        return (
            each
            for each in dtype_choices(room, self.model.config.n_layers)
            if self.ladder[-1] in each
        )

    def planner(
        self,
        inventory: Inventory,
        workload: Workload,
        dtypes: tuple[ComputeDtype, ...] | None,
    ) -> PipelinesPlanner:
        """Over devices of known speed, each with a dtype of its own; None: all with the lowest."""
        every = places_of(inventory)
        given = dtypes or (self.dtype,) * len(every)
        seats = [
            (place, dtype)
            for place, dtype in zip(every, given, strict=True)
            if device_speed(place.device, dtype) is not None
        ]
        placing = Placing(
            self.model,
            inventory,
            workload,
            [place for place, _ in seats],
            [dtype for _, dtype in seats],
            kv_bytes=kv_bytes_of(self.weights, workload),
        )
        return PipelinesPlanner(placing)


def _has_pins(workload: Workload) -> bool:
    return any(wish.layers for wish in workload.nodes)


def _alike(inventory: Inventory) -> Inventory:
    """As if all devices were equally fast."""
    return replace(
        inventory,
        nodes=tuple(
            replace(node, devices=tuple(replace(d, read_gbps=_ALIKE_GBPS) for d in node.devices))
            for node in inventory.nodes
        ),
    )


def without_times(plan: Plan) -> Plan:
    """The same with nothing predicted."""

    def untimed(stage: StagePlan) -> StagePlan:
        helpers = tuple(replace(each, step_s=None, hop_s=None) for each in stage.helpers)
        return replace(stage, step_s=None, hop_s=None, helpers=helpers)

    pipelines = tuple(
        replace(each, stages=tuple(map(untimed, each.stages)), prediction=None)
        for each in plan.pipelines
    )
    return replace(plan, pipelines=pipelines, best_possible=None)
