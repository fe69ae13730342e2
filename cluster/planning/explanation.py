"""What a plan leaves open: bytes to fetch, and the cheapest changes that would make it better."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from ...errors import InfeasiblePlanError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ..footprint import stored_dtype
from ..machines import ComputeDtype, Device, Inventory, Link
from ..plan import Objective, Pipeline, Plan, Workload
from ..search.cost import assumed_link, device_speed, known_links
from ..search.place import places_of
from ..search.search import EXACT_PLACES
from .advice import sufficient_changes
from .dtype_ladder import lower_dtypes
from .node_wishes import without_limits
from .plan_diff import needed_bytes
from .planner import can_plan, predicted
from .planner import plan as best_plan

_MOST_UNKNOWN = 3
"""Devices without a speed that are named."""
WORTH = 1.1
"""Times the present rate, from which on a change is worth a line."""
_BETTER = Link(source="", target="", rtt_s=0.08e-3, gbps=1.17)
"""10 GbE with Linux sockets."""


Placer = Callable[[ModelConfig, TensorIndex, Inventory, Workload], Plan]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFetch:
    """What one node needs of the release, in the checkpoint's dtype."""

    host: str
    needed_bytes: int
    held_bytes: int
    """Bytes of the release that its store has, needed or not."""

    @property
    def missing_bytes(self) -> int:
        """Still to come, at least."""
        return max(0, self.needed_bytes - self.held_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Improvement:
    """A change that would make the plan better, and how much."""

    change: str
    effect: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the plan was made for."""

    stored_bytes: int
    """Of the release."""
    stored_dtype: ComputeDtype
    dtype: ComputeDtype | None
    """That was asked for; None: any."""
    objective: Objective
    max_context_tokens: int
    max_concurrency: int
    num_nodes: int
    """That there are, whether they may be used or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What is said of a plan besides itself."""

    request: Request | None = None
    notes: tuple[str, ...] = ()
    """What of the request could not be followed, for want of measurements."""
    fetches: tuple[NodeFetch, ...] = ()
    improvements: tuple[Improvement, ...] = ()
    """What costs nothing first."""


def explained(
    config: ModelConfig,
    index: TensorIndex,
    inventory: Inventory,
    workload: Workload,
    plan: Plan,
    *,
    place: Placer = best_plan,
) -> Explanation:
    """Explain a plan that `place` made of these; pure. Plans anew only for few devices."""
    held = {node.host: node.held_bytes for node in inventory.nodes}
    fetches = tuple(
        NodeFetch(host=host, needed_bytes=needed, held_bytes=held.get(host, 0))
        for host, needed in needed_bytes(plan, index).items()
    )
    model = (config, index)
    improvements = (
        *_narrower(place, model, inventory, workload, plan),
        *_better_links(model, inventory, workload, plan),
        *_whole(model, inventory, workload, plan),
        *_faster_device(model, inventory, workload, plan),
    )
    return Explanation(
        request=Request(
            stored_bytes=sum(entry.num_bytes for entry in index),
            stored_dtype=stored_dtype(index),
            dtype=workload.dtype,
            objective=workload.objective,
            max_context_tokens=workload.max_context_tokens,
            max_concurrency=workload.max_concurrency,
            num_nodes=len(inventory.nodes),
        ),
        notes=tuple(_notes(inventory, workload, plan)),
        fetches=fetches,
        improvements=improvements,
    )


def _notes(inventory: Inventory, workload: Workload, plan: Plan) -> Iterator[str]:
    if plan.prediction is not None:
        return
    dtype = workload.dtype or plan.stages[0].dtype
    unknown = [
        f"{place.node.host} {place.device_name}"
        for place in places_of(inventory)
        if device_speed(place.device, dtype) is None
    ]
    if unknown:
        named = ", ".join(unknown[:_MOST_UNKNOWN])
        named += f" and {len(unknown) - _MOST_UNKNOWN} more" * (len(unknown) > _MOST_UNKNOWN)
        aim = "" if workload.objective == "fit" else f", and not for {workload.objective}"
        yield (
            f"placed by memory alone{aim}: nobody knows how fast {named} reads {dtype} weights; "
            "`magnetar nodes` measures it, and an inventory file says it by a profile or by "
            "readGigabytesPerSecond"
        )


_Model = tuple[ModelConfig, TensorIndex]


def _rate(plan: Plan | None) -> float:
    """What the plan was made to maximise; 0 where no speed is known."""
    if plan is None or plan.prediction is None:
        return 0.0
    told = plan.prediction
    return told.tokens_per_s if told.objective == "throughput" else told.stream_tokens_per_s


def _gain(change: str, now: Plan, then: Plan | None) -> Iterator[Improvement]:
    if _rate(now) and _rate(then) >= WORTH * _rate(now):
        assert now.prediction is not None
        whose = "" if now.prediction.objective == "throughput" else " for one stream"
        effect = f"{_rate(then):.1f} tokens/s{whose} in place of {_rate(now):.1f}"
        yield Improvement(change=change, effect=effect)


def _narrower(
    place: Placer, model: _Model, inventory: Inventory, workload: Workload, plan: Plan
) -> Iterator[Improvement]:
    """The next lower dtype everywhere, at a loss of quality."""
    lower = lower_dtypes(min((s.dtype for s in plan.stages), key=lambda d: len(lower_dtypes(d))))
    if not lower or plan.prediction is None or len(places_of(inventory)) > EXACT_PLACES:
        return
    try:
        then = place(*model, inventory, replace(workload, dtype=lower[0]))
    except InfeasiblePlanError:
        return
    yield from _gain(f"--dtype {lower[0]}", plan, then)


def _better_links(
    model: _Model, inventory: Inventory, workload: Workload, plan: Plan
) -> Iterator[Improvement]:
    """The same plan over 10 GbE where its links are slower."""
    known, hosts = known_links(inventory), plan.hosts
    slow = [
        link
        for a in hosts
        for b in hosts
        if a != b and (link := known.get((a, b), assumed_link(a, b))).gbps < _BETTER.gbps / 2
    ]
    if not slow:
        return
    # A link from afar keeps its round trip: no cable makes that shorter.
    faster = tuple(
        replace(
            link,
            gbps=_BETTER.gbps,
            rtt_s=link.rtt_s if link.rtt_s > 0.02 else min(link.rtt_s, _BETTER.rtt_s),
        )
        for link in slow
    )
    ends = {(link.source, link.target) for link in faster}
    kept = tuple(each for each in known.values() if (each.source, each.target) not in ends)
    then = predicted(plan, *model, replace(inventory, links=(*kept, *faster)), workload)
    pairs = {tuple(sorted((link.source, link.target))) for link in slow}
    between = " and ".join(next(iter(pairs))) if len(pairs) == 1 else f"{len(hosts)} nodes"
    yield from _gain(f"10 Gbit/s between {between}", plan, then)


def _whole(
    model: _Model, inventory: Inventory, workload: Workload, plan: Plan
) -> Iterator[Improvement]:
    """What would make the concessions needless: memory, or to ask for less of something else."""
    if not plan.concessions:
        return
    stored = workload.dtype or stored_dtype(model[1])
    conceded = {each.knob for each in plan.concessions}
    effects = {"dtype": f"all in {stored}", "context": "the whole context"}
    effect = ", ".join(effects[knob] for knob in effects if knob in conceded)
    allowed, wanted = without_limits(model[0], inventory, workload)
    enough = sufficient_changes(*model, allowed, wanted, stored, partial(can_plan, *model))
    for change in enough:
        # A lower dtype is what was conceded, or is told by what it gains.
        if change.knob not in ("dtype", *conceded):
            yield Improvement(change=change.text, effect=effect)


def _faster_device(
    model: _Model, inventory: Inventory, workload: Workload, plan: Plan
) -> Iterator[Improvement]:
    """The slowest stage on a device such as the fastest one of the plan."""
    pipeline = max(plan.pipelines, key=_bottleneck_s)
    if pipeline.bottleneck is None:
        return
    devices = {(p.node.host, p.device_name): p.device for p in places_of(inventory)}
    used = [devices[stage.host, stage.device] for stage in plan.stages]
    slowest = pipeline.stages[pipeline.bottleneck]
    slow, fast = devices[slowest.host, slowest.device], max(used, key=lambda d: d.read_gbps or 0.0)
    if (fast.read_gbps or 0.0) < WORTH * (slow.read_gbps or 0.0):
        return

    def swap(device: Device) -> Device:
        return replace(fast, kind=device.kind, index=device.index, memory_bytes=device.memory_bytes)

    then = predicted(plan, *model, _with(inventory, slowest.host, slow, swap), workload)
    name = f" ({fast.name})" if fast.name else ""
    change = (
        f"{slowest.host} {slowest.device} as fast as the fastest of the plan{name}, "
        f"{fast.read_gbps:.0f} GB/s"
    )
    yield from _gain(change, plan, then)


def _bottleneck_s(pipeline: Pipeline) -> float:
    return max(stage.step_s or 0.0 for stage in pipeline.stages)


def _with(
    inventory: Inventory, host: str, device: Device, change: Callable[[Device], Device]
) -> Inventory:
    nodes = tuple(
        replace(node, devices=tuple(change(d) if d is device else d for d in node.devices))
        if node.host == host
        else node
        for node in inventory.nodes
    )
    return replace(inventory, nodes=nodes)
