"""The actor that holds one stage.

Like those of the helper and the gateway it wraps parts of this room for
`cluster.deployment.pipeline_group`, which starts them on their nodes. Ray calls their methods from
several threads; torch is imported when there is something to compute.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..cluster.deployment.arrivals import AgentArrivals, arriving_tensors
from ..cluster.deployment.assignment import StageAssignment, helper_name, stage_name
from ..cluster.deployment.shard import stage_shard, steps_of
from ..cluster.deployment.status import StageLoad
from ..cluster.plan import StagePlan
from ..fetcher.checkpoint.release import facts_from_json
from .model.threads import end_team, prepare_threads
from .ring import dial, join_ring, listen

if TYPE_CHECKING:
    from ..cluster.links.listener import LinkListener
    from .engine.helper_link import HelperLink
    from .engine.stage import Stage
    from .engine.stage_worker import StageWorker


class StageActor:
    """Plays `cluster.deployment.assignment.StageRole`."""

    def __init__(self, assignment: StageAssignment) -> None:
        self._assignment = assignment
        self._loaded_bytes = 0
        self._loaded_parts = 0
        self._stop = threading.Event()
        self._stage: Stage | None = None
        self._listener: LinkListener | None = None
        self._helpers: list[HelperLink] = []
        self._worker: StageWorker | None = None

    def load(self) -> int:
        """Read the weights of the stage as they arrive in the files."""
        prepare_threads()
        import torch

        from .engine.stage import Stage

        given, plan = self._assignment, self._assignment.stage
        # Ray leaves one thread to an actor without reserved CPUs; the planner knows better.
        torch.set_num_threads(plan.num_threads)
        facts = facts_from_json(given.facts_json)
        arrivals = AgentArrivals(given.agent, self._stop)
        steps = steps_of(stage_shard(facts.index, plan))
        with arriving_tensors(arrivals, given.folder, facts.index, steps) as source:
            self._stage = Stage.load(
                config=facts.config,
                source=source,
                first_layer=plan.first_layer,
                end_layer=plan.end_layer,
                has_embeddings=plan.has_embeddings,
                has_output=plan.has_output,
                dtype=plan.dtype,
                device=plan.device,
                num_kv_blocks=given.num_kv_blocks,
                batch_invariant=given.batch_invariant,
                held_experts=_held_experts(plan, facts.config.num_experts),
                on_layer=self._count,
            )
        end_team()
        return self._stage.loaded_bytes

    def loaded(self) -> StageLoad:
        """How far `load` is."""
        plan = self._assignment.stage
        total = plan.end_layer - plan.first_layer
        # The embeddings come before the layers, the output head after them.
        layers = self._loaded_parts - plan.has_embeddings
        return StageLoad(
            pipeline=self._assignment.pipeline or 0,
            index=plan.index,
            num_layers=min(max(layers, 0), total),
            total_layers=total,
            num_bytes=self._loaded_bytes,
        )

    def listen(self) -> str:
        """Open the link for the stage before this one."""
        self._listener = listen(self._assignment.links)
        return self._listener.address

    def connect(self, downstream: str, helpers: Sequence[str]) -> None:
        """Join the ring and the helpers, and begin to execute steps."""
        from .engine.helper_link import HelperLink
        from .engine.stage_worker import StageWorker

        assert self._listener is not None
        assert self._stage is not None
        links, stage = self._assignment.links, self._assignment.stage
        name = stage_name(stage.index, self._assignment.pipeline)
        held = []
        for address, helper in zip(helpers, stage.helpers, strict=True):
            link = HelperLink(dial(links, address), name=helper_name(helper, of=name))
            self._helpers.append(link)
            held.append((link, dict(enumerate(helper.experts, start=stage.first_layer))))
        if held:
            self._stage.join_helpers(held)
        upstream, next_link = join_ring(links, self._listener, downstream)
        self._worker = StageWorker(
            self._stage,
            upstream=upstream,
            downstream=next_link,
            name=f"{name} on {stage.host}",
            expert_tokens=self._stage.expert_tokens,
        )
        self._worker.start()

    def run(self) -> None:
        """Stay until `stop`; raise what ended the worker otherwise."""
        assert self._worker is not None
        try:
            self._worker.wait()
        finally:
            self._leave_helpers()

    def stop(self) -> None:
        """End loading, the worker and the links."""
        self._stop.set()
        self._leave_helpers()  # first: the worker may wait for one
        if self._worker is not None:
            self._worker.stop()
        if self._listener is not None:
            self._listener.close()

    def _leave_helpers(self) -> None:
        for helper in self._helpers:
            helper.close()

    def _count(self, loaded_bytes: int) -> None:
        self._loaded_bytes = loaded_bytes
        self._loaded_parts += 1


def _held_experts(stage: StagePlan, num_experts: int) -> Mapping[int, Sequence[int]] | None:
    """By layer what the stage holds itself; None: everything, and it has no helpers."""
    if not stage.helpers:
        return None
    every = (tuple(range(num_experts)),) * (stage.end_layer - stage.first_layer)
    return dict(enumerate(stage.experts or every, start=stage.first_layer))
