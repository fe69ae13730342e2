"""The actors of a pipeline: stages and their helpers in a placement group, a gateway, the links."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from ...errors import (
    InterruptedByUserError,
    MagnetarError,
    PreflightError,
    StageLostError,
)
from ...fetcher.progress import ProgressSink
from ..plan import ExpertHost, Plan, StagePlan
from ..runtime.ray_calls import any_ended, call, endings, gather
from ..runtime.ray_runtime import RayNode
from ..spec import DeploymentSpec
from .arrivals import agent_name
from .assignment import (
    GatewayAssignment,
    HelperAssignment,
    LinkSetup,
    PipelineRoles,
    StageAssignment,
    helper_name,
)
from .load_progress import load_progress
from .status import StageLoad

PLACE_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 120.0
WARM_TIMEOUT_S: Final = 300.0
DEATH_NOTICE_S: Final = 1.0
"""Ray tells of a dead actor within 0.05 s."""
STOP_TIMEOUT_S: Final = 15.0
_METHODS_AT_ONCE: Final = 4


class PipelineGroup:
    """One incarnation of a pipeline; every actor's name carries its epoch."""

    def __init__(
        self,
        *,
        deployment: str,
        epoch: int,
        roles: PipelineRoles,
        nodes: Iterable[RayNode],
        detached: bool,
        stop: threading.Event,
    ) -> None:
        self._deployment = deployment
        self._epoch = epoch
        self._prefix = f"{deployment}/g{epoch}"
        self._roles = roles
        self._nodes: Mapping[str, RayNode] = {node.host: node for node in nodes}
        self._lifetime = "detached" if detached else None
        self._stop = stop
        self._secret = secrets.token_bytes(32)
        self._gateway: Any = None
        self._gateway_host = ""
        self._briefing: Any = None
        self._answers_to = ""
        self._stages: list[Any] = []
        self._helpers: list[list[Any]] = []
        """Of each stage."""
        self._names: list[str] = []
        """Of the actors, in the order of `_members`."""
        self._group: Any = None
        self._running: list[Any] = []

    def bind_gateway(self, host: str, *, listen: tuple[str, int], api_key: str | None) -> None:
        """Start the gateway on the node `host` and take its port; once."""
        if self._gateway is not None:
            return
        import ray

        self._gateway_host = host
        self._gateway = (
            ray.remote(self._roles.gateway)
            .options(
                name=f"{self._prefix}/gateway",
                lifetime=self._lifetime,
                num_cpus=0,
                max_concurrency=_METHODS_AT_ONCE,
                label_selector=self._nodes[host].selector,
            )
            .remote(*listen, api_key)
        )
        gather([self._gateway.bind.remote()], who="the gateway", stop=self._stop)

    def brief_gateway(
        self, plan: Plan, spec: DeploymentSpec, *, folder: str, facts_json: str
    ) -> None:
        """Tell the gateway what it will serve; it reads the tokenizer while the stages load."""
        (pipeline,) = plan.pipelines
        assignment = GatewayAssignment(
            links=self._links(plan, self._gateway_host),
            folder=folder,
            facts_json=facts_json,
            num_stages=pipeline.steps_at_once,
            num_kv_blocks=pipeline.num_kv_blocks,
            max_context_tokens=plan.max_context_tokens,
            max_running=spec.running_limit,
            max_waiting=spec.max_waiting,
            model_name=spec.model_name,
        )
        self._briefing = self._gateway.listen.remote(assignment)

    def place(
        self,
        plan: Plan,
        spec: DeploymentSpec,
        *,
        folders: Mapping[str, str],
        facts_json: str,
    ) -> None:
        """Reserve the memory of all stages and helpers, and start their actors.

        `folders` are those of the release on each node, whether or not they are complete.

        Raises:
            PreflightError: somebody else has reserved the memory in the meantime.
        """
        from ray.util.placement_group import placement_group

        (pipeline,) = plan.pipelines
        members: list[StagePlan | ExpertHost]
        members = [*plan.stages, *(helper for _, helper in _helpers_of(plan))]
        self._group = placement_group(
            # A card's memory is not Ray's to count; the bundle then only pins the node.
            [{"memory": _reserved_bytes(member)} for member in members],
            strategy="PACK",
            name=self._prefix,
            lifetime=self._lifetime,
            bundle_label_selector=[self._nodes[member.host].selector for member in members],
        )
        self._wait_placed(members)
        for stage in plan.stages:
            assignment = StageAssignment(
                links=self._links(plan, stage.host),
                stage=stage,
                num_kv_blocks=pipeline.num_kv_blocks,
                folder=folders[stage.host],
                agent=agent_name(self._deployment, stage.host),
                facts_json=facts_json,
                batch_invariant=spec.batch_invariant,
            )
            name = f"s{stage.index}"
            self._stages.append(self._start(self._roles.stage, assignment, name, len(self._stages)))
            self._helpers.append([])
        for bundle, (stage, helper) in enumerate(_helpers_of(plan), start=len(plan.stages)):
            task = HelperAssignment(
                links=self._links(plan, helper.host),
                helper=helper,
                stage_index=stage.index,
                first_layer=stage.first_layer,
                dtype=stage.dtype,
                folder=folders[helper.host],
                agent=agent_name(self._deployment, helper.host),
                facts_json=facts_json,
                batch_invariant=spec.batch_invariant,
            )
            helpers = self._helpers[stage.index]
            name = f"s{stage.index}/h{len(helpers)}"
            helpers.append(self._start(self._roles.helper, task, name, bundle))
        self._names = [
            "the gateway",
            *(f"stage {stage.index}" for stage in plan.stages),
            *(helper_name(stage.index, helper) for stage, helper in _helpers_of(plan)),
        ]

    def _start(self, role: type[Any], assignment: object, name: str, bundle: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return (
            ray.remote(role)
            .options(
                name=f"{self._prefix}/{name}",
                lifetime=self._lifetime,
                num_cpus=0,
                max_concurrency=_METHODS_AT_ONCE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=bundle
                ),
            )
            .remote(assignment)
        )

    def load(
        self,
        plan: Plan,
        on_progress: ProgressSink,
        *,
        on_loaded: Callable[[tuple[StageLoad, ...]], None],
    ) -> None:
        """Let all stages and helpers read their weights as they arrive; wait for the gateway.

        `on_loaded` hears how far the stages are, again and again; what it raises ends this.

        Raises:
            TokenizerError: the tokenizer does not fit the model.
            CheckpointError: the weights do not.
        """
        loading = self._members[1:]
        began = time.monotonic()

        def tell(*, finished: bool = False) -> None:
            refs = [stage.loaded.remote() for stage in self._stages]
            loads: list[StageLoad] = gather(refs, who="a stage", stop=self._stop)
            on_loaded(tuple(loads))
            helping = [helper.loaded_bytes.remote() for each in self._helpers for helper in each]
            helped: list[int] = gather(helping, who="a helper")
            for progress in load_progress(
                plan, loads, helped, seconds=time.monotonic() - began, finished=finished
            ):
                on_progress(progress)

        refs = [self._briefing, *(member.load.remote() for member in loading)]
        found = gather(refs, who="the pipeline", stop=self._stop, meanwhile=tell)
        self._answers_to = str(found[0])
        tell(finished=True)

    def connect(self) -> None:
        """Close the ring: gateway -> stage 0 -> ... -> last stage -> gateway; join the helpers."""
        members = self._members[1:]
        addresses = self._together([member.listen.remote() for member in members])
        address_of = dict(zip(members, addresses, strict=True))
        ring = [address_of[stage] for stage in self._stages] + [self._answers_to]
        connecting = [self._gateway.connect.remote(ring[0])]
        for stage, helpers, after in zip(self._stages, self._helpers, ring[1:], strict=True):
            there = [address_of[helper] for helper in helpers]
            connecting.append(stage.connect.remote(after, there))
            connecting.extend(helper.connect.remote() for helper in helpers)
        self._together(connecting)
        self._running = [member.run.remote() for member in self._members]

    def warm(self) -> float:
        """Send one token through every stage; the seconds it took."""
        (seconds,) = gather(
            [self._gateway.warm.remote()],
            who="the gateway",
            stop=self._stop,
            timeout_s=WARM_TIMEOUT_S,
        )
        return float(seconds)

    def serve(self) -> str:
        """Open the API; its URL on the gateway's node."""
        return str(call(self._gateway.serve.remote(), who="the gateway"))

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for, as the gateway knows it."""
        told = call(self._gateway.expert_tokens.remote(), who="the gateway")
        return {int(layer): tuple(counts) for layer, counts in told.items()}

    def lost(self, timeout_s: float) -> MagnetarError | None:
        """Wait up to `timeout_s` for an actor to end by itself; what ended it."""
        if not any_ended(self._running, timeout_s=timeout_s):
            return None
        # One that dies breaks the ring for all others: look for a death before any complaint, and
        # at the gateway first, to which the cause travels.
        ended = endings(self._running, self._names, timeout_s=DEATH_NOTICE_S)
        for death in (True, False):
            for ending in ended:
                if ending.is_death == death and ending.error is not None:
                    return ending.error
        return StageLostError("the pipeline came to its end by itself")

    def stop(self) -> None:
        """End the API, stages, helpers and the reservation; dying actors are not waited for."""
        import ray
        from ray.util.placement_group import remove_placement_group

        helpers = [helper for helpers in self._helpers for helper in helpers]
        for actors in ([self._gateway] if self._gateway else [], self._stages, helpers):
            stopping = [actor.stop.remote() for actor in actors]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
            for actor in actors:
                ray.kill(actor)
        if self._group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(self._group)
        self._gateway, self._group = None, None
        self._stages, self._helpers, self._running = [], [], []

    @property
    def _members(self) -> list[Any]:
        """All actors: the gateway, the stages, the helpers of each."""
        helpers = [helper for helpers in self._helpers for helper in helpers]
        return [self._gateway, *self._stages, *helpers]

    def _together(self, refs: list[Any]) -> list[Any]:
        return gather(refs, who="the pipeline", stop=self._stop, timeout_s=CONNECT_TIMEOUT_S)

    def _links(self, plan: Plan, host: str) -> LinkSetup:
        """Loopback where everything is on one node, else the node's own address."""
        alone = set(plan.hosts) == {self._gateway_host}
        return LinkSetup(
            deployment=self._deployment,
            epoch=self._epoch,
            secret=self._secret,
            listen_host="127.0.0.1" if alone else self._nodes[host].address,
        )

    def _wait_placed(self, members: Sequence[StagePlan | ExpertHost]) -> None:
        deadline = time.monotonic() + PLACE_TIMEOUT_S
        while not self._group.wait(1):
            if self._stop.is_set():
                raise InterruptedByUserError("stopped")
            if time.monotonic() > deadline:
                wanted = ", ".join(
                    f"{_reserved_bytes(member) / 1e9:.1f} GB on {member.host}" for member in members
                )
                raise PreflightError(
                    f"Ray does not grant the memory that the plan found free ({wanted}); another "
                    "deployment has reserved it: take that down, or use other nodes"
                )


def _helpers_of(plan: Plan) -> Iterator[tuple[StagePlan, ExpertHost]]:
    return ((stage, helper) for stage in plan.stages for helper in stage.helpers)


def _reserved_bytes(member: StagePlan | ExpertHost) -> int:
    kv_bytes = member.kv_bytes if isinstance(member, StagePlan) else 0
    return max(1, member.weights_bytes + kv_bytes) if member.device == "cpu" else 1
