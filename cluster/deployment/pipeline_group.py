"""The actors of a deployment's pipelines in one placement group, and a gateway before them."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Final

from ...errors import InterruptedByUserError, MagnetarError, PreflightError
from ...fetcher.progress import ProgressSink
from ..plan import ExpertHost, Plan, StagePlan
from ..runtime.ray_calls import any_ended, call, gather
from ..runtime.ray_runtime import RayNode
from ..spec import DeploymentSpec
from .assignment import GatewayAssignment, LinkSetup, PipelineRoles, RingAssignment
from .load_progress import load_progress
from .pipeline_actors import Loading, PipelineActors, members_of
from .status import StageLoad

PLACE_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 120.0
WARM_TIMEOUT_S: Final = 300.0
STOP_TIMEOUT_S: Final = 15.0
_METHODS_AT_ONCE: Final = 4


class PipelineGroup:
    """One incarnation of all pipelines; every actor's name carries its epoch."""

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
        self._answers_to: tuple[str, ...] = ()
        """Where the gateway hears the last stage of each pipeline."""
        self._pipelines: list[PipelineActors] = []
        self._lost: set[int] = set()
        self._group: Any = None

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
        num_pipelines, speeds = len(plan.pipelines), _speeds(plan)
        max_running = spec.running_limit
        if spec.max_running is not None:  # what was asked for is for all together
            max_running = -(-spec.max_running // num_pipelines)
        assignment = GatewayAssignment(
            rings=tuple(
                RingAssignment(
                    links=self._links(plan, number, self._gateway_host),
                    num_stages=pipeline.steps_at_once,
                    max_step_tokens=pipeline.max_step_tokens,
                    num_kv_blocks=pipeline.num_kv_blocks,
                    max_running=max_running,
                    max_waiting=-(-spec.max_waiting // num_pipelines),
                    speed=speed,
                )
                for pipeline, number, speed in zip(
                    plan.pipelines, _numbers(plan), speeds, strict=True
                )
            ),
            folder=folder,
            facts_json=facts_json,
            max_context_tokens=plan.max_context_tokens,
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

        members = [member for pipeline in plan.pipelines for member in members_of(pipeline)]
        self._group = placement_group(
            # A card's memory is not Ray's to count; the bundle then only pins the node.
            [{"memory": _reserved_bytes(member)} for member in members],
            strategy="PACK",
            name=self._prefix,
            lifetime=self._lifetime,
            bundle_label_selector=[self._nodes[member.host].selector for member in members],
        )
        self._wait_placed(members)
        bundles = count()
        loading = Loading(
            deployment=self._deployment,
            folders=folders,
            facts_json=facts_json,
            batch_invariant=spec.batch_invariant,
        )

        def start(role: type[Any], assignment: object, name: str) -> Any:
            return self._start(role, assignment, name, next(bundles))

        for pipeline, number in zip(plan.pipelines, _numbers(plan), strict=True):
            self._pipelines.append(
                PipelineActors(
                    pipeline,
                    number=number,
                    roles=self._roles,
                    start=start,
                    links=partial(self._links, plan, number),
                    loading=loading,
                )
            )

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
        began = time.monotonic()

        def tell(*, finished: bool = False) -> None:
            refs = [stage.loaded.remote() for stage in self._stages]
            loads: list[StageLoad] = gather(refs, who="a stage", stop=self._stop)
            on_loaded(tuple(loads))
            helping = [helper.loaded_bytes.remote() for helper in self._helpers]
            helped: list[int] = gather(helping, who="a helper")
            for progress in load_progress(
                plan, loads, helped, seconds=time.monotonic() - began, finished=finished
            ):
                on_progress(progress)

        refs = [self._briefing, *(member.load.remote() for member in self._members)]
        found = gather(refs, who="the pipeline", stop=self._stop, meanwhile=tell)
        self._answers_to = tuple(found[0])
        tell(finished=True)

    def connect(self) -> None:
        """Close the rings: gateway -> stage 0 -> ... -> last stage -> gateway; join the helpers."""
        members = self._members
        addresses = self._together([member.listen.remote() for member in members])
        address_of = dict(zip(members, addresses, strict=True))
        first = [address_of[pipeline.stages[0]] for pipeline in self._pipelines]
        connecting = [self._gateway.connect.remote(first)]
        for pipeline, answers_to in zip(self._pipelines, self._answers_to, strict=True):
            connecting += pipeline.connect(address_of, answers_to)
        self._together(connecting)
        for pipeline in self._pipelines:
            pipeline.run()

    def warm(self) -> tuple[float, ...]:
        """Send one token through every stage; the seconds it took in each pipeline."""
        (seconds,) = gather(
            [self._gateway.warm.remote()],
            who="the gateway",
            stop=self._stop,
            timeout_s=WARM_TIMEOUT_S,
        )
        return tuple(map(float, seconds))

    def serve(self) -> str:
        """Open the API; its URL on the gateway's node."""
        return str(call(self._gateway.serve.remote(), who="the gateway"))

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for, as the gateway knows it."""
        told = call(self._gateway.expert_tokens.remote(), who="the gateway")
        return {int(layer): tuple(counts) for layer, counts in told.items()}

    def lost(self, timeout_s: float) -> dict[int, MagnetarError]:
        """Wait up to `timeout_s` for pipelines to end by themselves; what ended each of these.

        Each is told of once. While others live, what remains of it is ended too.
        """
        living = {n: each for n, each in enumerate(self._pipelines) if n not in self._lost}
        running = [ref for pipeline in living.values() for ref in pipeline.running]
        if not any_ended(running, timeout_s=timeout_s):
            return {}
        found = {
            number: pipeline.cause(self._gateway.ending.remote(number))
            for number, pipeline in living.items()
            if pipeline.has_ended
        }
        self._lost.update(found)
        if len(self._lost) < len(self._pipelines):
            for number in found:
                self._pipelines[number].kill()
        return found

    def stop(self) -> None:
        """End the API, stages, helpers and the reservation; dying actors are not waited for."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actors in ([self._gateway] if self._gateway else [], self._stages, self._helpers):
            stopping = [actor.stop.remote() for actor in actors]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
            for actor in actors:
                ray.kill(actor)
        if self._group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                remove_placement_group(self._group)
        self._gateway, self._group = None, None
        self._pipelines = []

    @property
    def _members(self) -> list[Any]:
        """All actors but the gateway."""
        return [member for pipeline in self._pipelines for member in pipeline.members]

    @property
    def _stages(self) -> list[Any]:
        return [stage for pipeline in self._pipelines for stage in pipeline.stages]

    @property
    def _helpers(self) -> list[Any]:
        """Of all stages, pipeline by pipeline."""
        return [member for each in self._pipelines for member in each.members[len(each.stages) :]]

    def _together(self, refs: list[Any]) -> list[Any]:
        return gather(refs, who="the pipeline", stop=self._stop, timeout_s=CONNECT_TIMEOUT_S)

    def _links(self, plan: Plan, number: int | None, host: str) -> LinkSetup:
        """Loopback where everything is on one node, else the node's own address."""
        alone = set(plan.hosts) == {self._gateway_host}
        return LinkSetup(
            ring=self._deployment if number is None else f"{self._deployment}/p{number}",
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


def _numbers(plan: Plan) -> Sequence[int | None]:
    """What the pipelines are called: nothing where there is only one."""
    return range(len(plan.pipelines)) if len(plan.pipelines) > 1 else (None,)


def _speeds(plan: Plan) -> list[float]:
    """Of each pipeline against the others: as predicted, or else by what fits at once."""
    told = [each.prediction.tokens_per_s for each in plan.pipelines if each.prediction is not None]
    if len(told) == len(plan.pipelines):
        return told
    return [float(each.max_concurrency) for each in plan.pipelines]


def _reserved_bytes(member: StagePlan | ExpertHost) -> int:
    kv_bytes = member.kv_bytes if isinstance(member, StagePlan) else 0
    return max(1, member.weights_bytes + kv_bytes) if member.device == "cpu" else 1
