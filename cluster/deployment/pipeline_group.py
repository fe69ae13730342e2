"""The actors of a deployment's pipelines in one reservation, and a gateway before them."""

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from ...errors import InterruptedByUserError, MagnetarError, StageLostError
from ...fetcher.progress import ProgressSink
from ..plan import Plan
from ..runtime.ray_calls import any_ended, gather
from ..runtime.ray_runtime import RayNode, living_nodes
from ..spec import DeploymentSpec
from .assignment import LinkSetup, PipelineRoles
from .front import Front, ring_assignment
from .load_progress import load_progress
from .pipeline_actors import Loading, PipelineActors, members_of
from .reservation import Reservation
from .status import StageLoad

CONNECT_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 15.0
_MAX_STARTS: Final = 1 << 20
"""Of one pipeline under one epoch of the deployment."""


class PipelineGroup:
    """All pipelines from `place` to `stop`; every actor's name carries the deployment's epoch.

    What concerns one pipeline after `serve` is for a thread of that pipeline.
    """

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
        self._front: Front | None = None
        self._plan: Plan | None = None
        self._spec: DeploymentSpec | None = None
        self._loading: Loading | None = None
        self._reservation: Reservation | None = None
        self._pipelines: list[PipelineActors] = []
        self._num_starts: list[int] = []
        """Of each pipeline, the first included."""

    def bind_gateway(self, host: str, *, listen: tuple[str, int], api_key: str | None) -> None:
        """Start the gateway on the node `host` and take its port."""
        self._front = Front(
            self._roles.gateway,
            node=self._nodes[host],
            name=f"{self._prefix}/gateway",
            lifetime=self._lifetime,
            listen=listen,
            api_key=api_key,
            stop=self._stop,
        )

    def brief_gateway(
        self, plan: Plan, spec: DeploymentSpec, *, folder: str, facts_json: str
    ) -> None:
        """Tell the gateway what it will serve; it reads the tokenizer while the stages load."""
        self._gateway.brief(plan, spec, folder=folder, facts_json=facts_json)

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
        self._plan, self._spec = plan, spec
        self._loading = Loading(
            deployment=self._deployment,
            folders=folders,
            facts_json=facts_json,
            batch_invariant=spec.batch_invariant,
        )
        self._reservation = Reservation(
            [member for pipeline in plan.pipelines for member in members_of(pipeline)],
            nodes=self._nodes,
            prefix=self._prefix,
            lifetime=self._lifetime,
            stop=self._stop,
        )
        self._reservation.wait()
        self._num_starts = [0 for _ in plan.pipelines]
        for number in range(len(plan.pipelines)):
            self._pipelines.append(self._actors_of(number))

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

        members = [member for pipeline in self._pipelines for member in pipeline.members]
        refs = [self._gateway.briefing, *(member.load.remote() for member in members)]
        gather(refs, who="the pipeline", stop=self._stop, meanwhile=tell)
        tell(finished=True)

    def connect(self) -> None:
        """Close all rings: gateway -> stage 0 -> ... -> last stage -> gateway; join the helpers."""
        self._connect(range(len(self._pipelines)))

    def warm(self) -> tuple[float, ...]:
        """Send one token through every stage; the seconds it took in each pipeline."""
        return tuple(self._gateway.warm(range(len(self._pipelines))))

    def serve(self) -> str:
        """Open the API; its URL on the gateway's node."""
        return self._gateway.serve()

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        """By layer, the tokens that each expert was chosen for, as the gateway knows it."""
        return self._gateway.expert_tokens()

    def gateway_death(self) -> MagnetarError | None:
        """What ended the gateway's process; None while it lives."""
        return self._gateway.death()

    def lost(self, number: int, timeout_s: float) -> MagnetarError | None:
        """Wait up to `timeout_s` for a pipeline to end by itself; what ended it.

        Raises:
            InterruptedByUserError: the gateway died, and all pipelines with it.
        """
        pipeline = self._pipelines[number]
        if not any_ended(pipeline.running, timeout_s=timeout_s):
            return None
        cause = pipeline.cause(self._gateway.actor.ending.remote(number))
        if (death := self.gateway_death()) is not None:
            raise InterruptedByUserError(str(death))
        return cause

    def clear(self, number: int) -> None:
        """End what is left of a pipeline at once."""
        self._pipelines[number].kill()

    def missing(self, number: int) -> tuple[str, ...]:
        """Nodes of a pipeline that Ray does not have now."""
        assert self._plan is not None
        return tuple(sorted(set(self._plan.pipelines[number].hosts) - living_nodes().keys()))

    def start_again(self, number: int) -> None:
        """Start a pipeline where it was, from the files that are there, until requests go to it.

        After `clear`. Raises what kept it from that.
        """
        assert self._reservation is not None
        self._reservation.wait()
        self._num_starts[number] += 1
        self._pipelines[number] = pipeline = self._actors_of(number)
        gather(
            [member.load.remote() for member in pipeline.members],
            who=f"pipeline {number}",
            stop=self._stop,
            meanwhile=partial(self._check, number),
        )
        self._connect([number])
        self._gateway.warm([number])
        self._gateway.admit(number)

    def stop(self) -> None:
        """End the API, stages, helpers and the reservation; dying actors are not waited for."""
        import ray

        gateway = [] if self._front is None else [self._front.actor]
        for actors in (gateway, self._stages, self._helpers):
            stopping = [actor.stop.remote() for actor in actors]
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
            for actor in actors:
                ray.kill(actor)
        if self._reservation is not None:
            self._reservation.end()
        self._front, self._reservation = None, None
        self._pipelines = []

    @property
    def _gateway(self) -> Front:
        assert self._front is not None, "the gateway comes first"
        return self._front

    @property
    def _stages(self) -> list[Any]:
        return [stage for pipeline in self._pipelines for stage in pipeline.stages]

    @property
    def _helpers(self) -> list[Any]:
        """Of all stages, pipeline by pipeline."""
        return [member for each in self._pipelines for member in each.members[len(each.stages) :]]

    def _actors_of(self, number: int) -> PipelineActors:
        assert self._plan is not None
        assert self._reservation is not None
        assert self._loading is not None
        before = self._plan.pipelines[:number]
        return PipelineActors(
            self._plan.pipelines[number],
            number=self._name_of(number),
            num_restarts=self._num_starts[number],
            roles=self._roles,
            reservation=self._reservation,
            first_bundle=sum(len(members_of(pipeline)) for pipeline in before),
            links=partial(self._links, number),
            loading=self._loading,
        )

    def _connect(self, numbers: Sequence[int]) -> None:
        assert self._plan is not None
        assert self._spec is not None
        gateway, members, listening = self._gateway, [], []
        for number in numbers:
            members += self._pipelines[number].members
            links = self._links(number, gateway.host)
            ring = ring_assignment(self._plan, self._spec, links, number)
            listening.append(gateway.actor.listen.remote(number, ring))
        addresses = self._together([member.listen.remote() for member in members])
        address_of = dict(zip(members, addresses, strict=True))
        answers_to = self._together(listening)
        connecting = []
        for number, answers in zip(numbers, answers_to, strict=True):
            pipeline = self._pipelines[number]
            first = address_of[pipeline.stages[0]]
            connecting.append(gateway.actor.connect.remote(number, first))
            connecting += pipeline.connect(address_of, answers)
        self._together(connecting)
        for number in numbers:
            self._pipelines[number].run()

    def _together(self, refs: list[Any]) -> list[Any]:
        return gather(refs, who="the pipeline", stop=self._stop, timeout_s=CONNECT_TIMEOUT_S)

    def _check(self, number: int) -> None:
        """Raise what makes it useless to go on with a start."""
        if (death := self.gateway_death()) is not None:
            raise InterruptedByUserError(str(death))
        if missing := self.missing(number):
            raise StageLostError(f"{', '.join(missing)} left the cluster")

    def _name_of(self, number: int) -> int | None:
        """What a pipeline is called: nothing where there is only one."""
        assert self._plan is not None
        return number if len(self._plan.pipelines) > 1 else None

    def _links(self, number: int, host: str) -> LinkSetup:
        """Loopback where everything is on one node, else the node's own address."""
        assert self._plan is not None
        name = self._name_of(number)
        alone = set(self._plan.hosts) == {self._gateway.host}
        # A node that came back may have another address.
        node = self._nodes[host] if alone else living_nodes().get(host, self._nodes[host])
        return LinkSetup(
            ring=self._deployment if name is None else f"{self._deployment}/p{name}",
            # Later starts of a pipeline, and of the deployment, are above all earlier ones.
            epoch=self._epoch * _MAX_STARTS + self._num_starts[number],
            secret=self._secret,
            listen_host="127.0.0.1" if alone else node.address,
        )
