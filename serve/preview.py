"""Where a deployment would be placed, without deploying it."""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..cluster.deployment.agent_group import AgentGroup
from ..cluster.deployment.source_fetch import fetch_of
from ..cluster.inventory.inventory import host_label, probe_node
from ..cluster.inventory.link_cache import remembered_links
from ..cluster.machines import Inventory
from ..cluster.plan import Plan, Workload
from ..cluster.planning.expert_pins import ExpertPin, pin_experts
from ..cluster.planning.explanation import Explanation, explained
from ..cluster.planning.plan_diff import with_memory_of
from ..cluster.planning.planner import plan as place_model
from ..cluster.planning.planner import predicted
from ..cluster.planning.popularity import popularity_of
from ..cluster.planning.workload import workload_of
from ..cluster.runtime.ray_runtime import home_node, joined_ray, ray_nodes
from ..cluster.spec import DeploymentSpec
from ..errors import NotFoundError
from ..fetcher.checkpoint.release import ReleaseFacts
from ..fetcher.config import ModelConfig
from ..fetcher.progress import ProgressSink
from ..fetcher.store import Store
from ..fetcher.tensors import TensorIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanPreview:
    """What `up` would do."""

    config: ModelConfig
    index: TensorIndex
    inventory: Inventory
    plan: Plan
    explanation: Explanation
    running: Plan | None = None
    """What runs now, with its times in the traffic that the plan was made for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A deployment that runs."""

    plan: Plan
    expert_tokens: Mapping[int, tuple[int, ...]]
    """By layer, the tokens that each expert was chosen for."""


def plan_only(
    spec: DeploymentSpec,
    *,
    ray_address: str | None = None,
    inventory: Inventory | None = None,
    described: tuple[ModelConfig, TensorIndex] | None = None,
    running: Running | None = None,
    from_traffic: bool = False,
    on_progress: ProgressSink,
    stop: threading.Event,
) -> PlanPreview:
    """Where `up` would place the model; fetches no more than what describes it.

    With `inventory` the machines are those, whether they exist or not, and where the release is
    `described` already nothing is fetched at all. Without it and without
    `ray_address` this machine alone is looked at, and no Ray is started. The memory that `running`
    holds counts as free; `from_traffic` its experts are taken to be as popular as they were.

    Raises:
        InfeasiblePlanError: no placement fits.
        NotFoundError: there was no traffic to plan from.
        MagnetarError: the release could not be read.
    """
    if inventory is not None and described is not None:
        config, index = described
    else:
        facts, found = _look(spec, ray_address if inventory is None else None, on_progress, stop)
        config, index, inventory = facts.config, facts.index, inventory or found
    if running is not None:
        inventory = with_memory_of(running.plan, inventory)
    workload = workload_of(spec, config)
    if running is not None and from_traffic:
        workload = replace(workload, popularity=_popularity(running, config))
    model = (config, index, inventory, workload)
    place = partial(_placed, spec.expert_pins) if spec.expert_pins else place_model
    plan = place(*model)
    return PlanPreview(
        config=config,
        index=index,
        inventory=inventory,
        plan=plan,
        explanation=explained(*model, plan, place=place),
        running=None if running is None else _as_it_runs(running.plan, model),
    )


def _look(
    spec: DeploymentSpec,
    ray_address: str | None,
    on_progress: ProgressSink,
    stop: threading.Event,
) -> tuple[ReleaseFacts, Inventory]:
    """What the release consists of, and what the machines that there are have."""
    if ray_address is None:
        facts, inventory = _look_here(spec, on_progress, stop)
    else:
        with joined_ray(ray_address):
            nodes = ray_nodes()
            agents = AgentGroup(
                deployment=f"{spec.name}/plan",
                store=spec.store,
                nodes=nodes,
                home=home_node(nodes).host,
                detached=False,
                on_progress=on_progress,
                stop=stop,
            )
            try:
                facts, info_hash = agents.look(spec.source)
                inventory = agents.inventory(info_hash)
            finally:
                agents.stop()
    return facts, _with_folder(inventory, facts) if spec.source.kind == "folder" else inventory


def _placed(
    pins: tuple[ExpertPin, ...],
    config: ModelConfig,
    index: TensorIndex,
    inventory: Inventory,
    workload: Workload,
) -> Plan:
    """A plan with experts where a user wants them; times go by how often each is needed."""
    plan = place_model(config, index, inventory, workload)
    plan = pin_experts(plan, pins, config, index, inventory)
    return predicted(plan, config, index, inventory, workload)


def _as_it_runs(plan: Plan, model: tuple[ModelConfig, TensorIndex, Inventory, Workload]) -> Plan:
    """With its times for the same streams; it need not do what is wished of nodes now."""
    config, index, inventory, workload = model
    return predicted(plan, config, index, inventory, replace(workload, nodes=()))


def _popularity(running: Running, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    if not any(map(any, running.expert_tokens.values())):
        raise NotFoundError(
            "the deployment has not counted any experts yet: send it requests first, or plan "
            "without --from-traffic"
        )
    return popularity_of(running.expert_tokens, config)


def _look_here(
    spec: DeploymentSpec, on_progress: ProgressSink, stop: threading.Event
) -> tuple[ReleaseFacts, Inventory]:
    source, host = spec.source, host_label()
    store = Path(spec.store.replace("{host}", host)).expanduser()
    with contextlib.closing(fetch_of(source, store, on_progress=on_progress, stop=stop)) as fetch:
        look = fetch.look(given=source.given, known=source.known)
        if look is None:
            fetch.metadata(waits=True)
        facts = look.facts if look else fetch.facts(given=source.given, known=source.known)
        held = Store(store).held_bytes(fetch.info_hash)
    nodes = (replace(probe_node(host, "127.0.0.1", store), held_bytes=held),)
    return facts, Inventory(nodes=nodes, links=remembered_links(nodes))


def _with_folder(inventory: Inventory, facts: ReleaseFacts) -> Inventory:
    """Every node reads a release folder where it lies: nobody has anything to fetch."""
    whole = sum(entry.num_bytes for entry in facts.index)
    nodes = (replace(node, held_bytes=whole) for node in inventory.nodes)
    return replace(inventory, nodes=tuple(nodes))
