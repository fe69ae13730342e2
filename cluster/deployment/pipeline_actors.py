"""The actors of one pipeline: its stages in order, and the helpers of each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from ...errors import MagnetarError, StageLostError
from ..plan import ExpertHost, Pipeline, StagePlan
from ..runtime.ray_calls import endings
from .arrivals import agent_name
from .assignment import (
    HelperAssignment,
    LinkSetup,
    PipelineRoles,
    StageAssignment,
    helper_name,
    stage_name,
)
from .reservation import Reservation

DEATH_NOTICE_S: Final = 1.0
"""Ray tells of a dead actor within 0.05 s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loading:
    """What all members read their weights with."""

    deployment: str
    folders: Mapping[str, str]
    """Of the release on each node, whether or not it is complete."""
    facts_json: str
    batch_invariant: bool


class PipelineActors:
    """One pipeline of a deployment, from its start to its end; it is started again as another."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        number: int | None,
        num_restarts: int,
        roles: PipelineRoles,
        reservation: Reservation,
        first_bundle: int,
        links: Callable[[str], LinkSetup],
        loading: Loading,
    ) -> None:
        """Start the actors, in the order of `members_of`, in the bundles from `first_bundle` on.

        `number` says which of several pipelines it is; `links` makes the setup for an end on a
        host.
        """
        bundles = count(first_bundle)

        def start(role: type[Any], assignment: object, name: str) -> Any:
            return reservation.start(role, assignment, prefix + name, next(bundles))

        self._running: list[Any] = []
        self.stages: list[Any] = []
        self.helpers: list[list[Any]] = [[] for _ in pipeline.stages]
        """Of each stage."""
        self._names = ["the gateway"]
        prefix = "" if number is None else f"p{number}/"
        if num_restarts:  # Ray may still know those of before by their names
            prefix += f"r{num_restarts}/"
        for stage in pipeline.stages:
            assignment = StageAssignment(
                links=links(stage.host),
                stage=stage,
                num_kv_blocks=pipeline.num_kv_blocks,
                folder=loading.folders[stage.host],
                agent=agent_name(loading.deployment, stage.host),
                facts_json=loading.facts_json,
                batch_invariant=loading.batch_invariant,
                pipeline=number,
            )
            self.stages.append(start(roles.stage, assignment, f"s{stage.index}"))
            self._names.append(stage_name(stage.index, number))
        for stage, helper in helpers_of(pipeline):
            task = HelperAssignment(
                links=links(helper.host),
                helper=helper,
                stage_index=stage.index,
                first_layer=stage.first_layer,
                dtype=stage.dtype,
                folder=loading.folders[helper.host],
                agent=agent_name(loading.deployment, helper.host),
                facts_json=loading.facts_json,
                batch_invariant=loading.batch_invariant,
                pipeline=number,
            )
            helpers = self.helpers[stage.index]
            name = f"s{stage.index}/h{len(helpers)}"
            helpers.append(start(roles.helper, task, name))
            self._names.append(helper_name(helper, of=stage_name(stage.index, number)))

    @property
    def members(self) -> list[Any]:
        """The stages, then the helpers of each."""
        return [*self.stages, *(helper for helpers in self.helpers for helper in helpers)]

    def connect(self, address_of: Mapping[Any, str], answers_to: str) -> list[Any]:
        """Begin to close the ring, which ends at the gateway's address; the calls to wait for."""
        connecting = []
        after = [*(address_of[stage] for stage in self.stages[1:]), answers_to]
        for stage, helpers, downstream in zip(self.stages, self.helpers, after, strict=True):
            there = [address_of[helper] for helper in helpers]
            connecting.append(stage.connect.remote(downstream, there))
            connecting.extend(helper.connect.remote() for helper in helpers)
        return connecting

    def run(self) -> None:
        """Let all run."""
        self._running = [member.run.remote() for member in self.members]

    @property
    def running(self) -> list[Any]:
        """The calls that end when the pipeline does: whoever leaves closes the links to others."""
        return self._running

    def cause(self, at_gateway: Any) -> MagnetarError:
        """What ended it; `at_gateway` is the call that asks the gateway. Waits a moment."""
        # One that dies breaks the ring for all others: look for a death before any complaint, and
        # at the gateway first, to which the cause travels.
        ended = endings([at_gateway, *self._running], self._names, timeout_s=DEATH_NOTICE_S)
        for death in (True, False):
            for ending in ended:
                if ending.is_death == death and ending.error is not None:
                    return ending.error
        return StageLostError("the pipeline came to its end by itself")

    def kill(self) -> None:
        """End what is left of it at once; nobody needs its memory any more."""
        import ray

        for member in self.members:
            ray.kill(member)
        self._running = []


def members_of(pipeline: Pipeline) -> list[StagePlan | ExpertHost]:
    """The stages, then the helpers of each."""
    return [*pipeline.stages, *(helper for _, helper in helpers_of(pipeline))]


def helpers_of(pipeline: Pipeline) -> Iterator[tuple[StagePlan, ExpertHost]]:
    """Each helper with its stage."""
    return ((stage, helper) for stage in pipeline.stages for helper in stage.helpers)
