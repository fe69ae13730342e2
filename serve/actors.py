"""The two actors of a pipeline: a stage, and the gateway with the engine.

They wrap the parts of this room for `cluster.deployment.pipeline_group`, which starts them on their
nodes. Ray calls their methods from several threads; torch is imported when there is something to
compute.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster.deployment.arrivals import AgentArrivals, arriving_tensors
from ..cluster.deployment.assignment import (
    GatewayAssignment,
    LinkSetup,
    StageAssignment,
    helper_name,
)
from ..cluster.deployment.shard import stage_shard, steps_of
from ..cluster.deployment.status import StageLoad
from ..cluster.plan import StagePlan
from ..fetcher.checkpoint.release import ReleaseFacts, facts_from_json
from .api.server import Server, bind
from .model.threads import end_team, prepare_threads
from .text.load import load_tokenizer
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..cluster.links.link import LinkListener, TcpLink
    from .engine.engine import Engine
    from .engine.helper_link import HelperLink
    from .engine.stage import Stage
    from .engine.stage_worker import StageWorker

LINK_TIMEOUT_S = 60.0
"""For a neighbour in the ring to dial or to answer; all are told to at the same time."""
DRAIN_S = 5.0
"""For answers that run when the deployment is stopped."""


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
            index=plan.index,
            num_layers=min(max(layers, 0), total),
            total_layers=total,
            num_bytes=self._loaded_bytes,
        )

    def listen(self) -> str:
        """Open the link for the stage before this one."""
        self._listener = _listen(self._assignment.links)
        return self._listener.address

    def connect(self, downstream: str, helpers: Sequence[str]) -> None:
        """Join the ring and the helpers, and begin to execute steps."""
        from .engine.helper_link import HelperLink
        from .engine.stage_worker import StageWorker

        assert self._listener is not None
        assert self._stage is not None
        links, stage = self._assignment.links, self._assignment.stage
        held = []
        for address, helper in zip(helpers, stage.helpers, strict=True):
            link = HelperLink(_dial(links, address), name=helper_name(stage.index, helper))
            self._helpers.append(link)
            held.append((link, dict(enumerate(helper.experts, start=stage.first_layer))))
        if held:
            self._stage.join_helpers(held)
        upstream, next_link = _join_ring(links, self._listener, downstream)
        self._worker = StageWorker(
            self._stage,
            upstream=upstream,
            downstream=next_link,
            name=f"stage {stage.index} on {stage.host}",
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


class GatewayActor:
    """Plays `cluster.deployment.assignment.GatewayRole`."""

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        self._wish = (host, port)
        self._api_key = api_key
        self._socket: socket.socket | None = None
        self._facts: ReleaseFacts | None = None
        self._tokenizer: Tokenizer | None = None
        self._assignment: GatewayAssignment | None = None
        self._listener: LinkListener | None = None
        self._engine: Engine | None = None
        self._server: Server | None = None

    def bind(self) -> int:
        """Take the port; nobody is answered yet."""
        host, port = self._wish
        self._socket = bind(host, port, has_api_key=self._api_key is not None)
        return int(self._socket.getsockname()[1])

    def listen(self, assignment: GatewayAssignment) -> str:
        """Read the tokenizer and open the link on which the last stage answers."""
        # A second of imports that `connect` would take when all the stages are ready.
        from .engine.engine import Engine  # noqa: F401

        self._assignment = assignment
        self._facts = facts_from_json(assignment.facts_json)
        self._tokenizer = load_tokenizer(Path(assignment.folder), self._facts)
        self._listener = _listen(assignment.links)
        return self._listener.address

    def connect(self, downstream: str) -> None:
        """Close the ring and start the engine."""
        import torch

        from .engine.engine import Engine

        torch.set_num_threads(1)  # the stages compute
        given, facts = self._assignment, self._facts
        assert given is not None
        assert facts is not None
        assert self._listener is not None
        assert self._tokenizer is not None
        upstream, first_stage = _join_ring(given.links, self._listener, downstream)
        self._engine = Engine(
            config=facts.config,
            num_kv_blocks=given.num_kv_blocks,
            max_context_tokens=given.max_context_tokens,
            max_running=given.max_running,
            max_waiting=given.max_waiting,
            num_stages=given.num_stages,
            downstream=first_stage,
            upstream=upstream,
            eos_token_ids=self._tokenizer.eos_ids,
        )
        self._engine.start()

    def warm(self) -> float:
        """Seconds that one token took through every stage."""
        assert self._engine is not None
        return asyncio.run(self._engine.probe())

    def serve(self) -> str:
        """Answer requests from now on."""
        from .api.app import create_app

        given, facts = self._assignment, self._facts
        assert given is not None
        assert facts is not None
        assert self._engine is not None
        assert self._tokenizer is not None
        assert self._socket is not None
        app = create_app(
            engine=self._engine,
            tokenizer=self._tokenizer,
            chat_format=facts.chat_format,
            model_name=given.model_name,
            max_context_tokens=given.max_context_tokens,
            created=int(time.time()),
            api_key=self._api_key,
        )
        self._server = Server(app, self._socket)
        self._server.start()
        return self._server.url

    def expert_tokens(self) -> Mapping[int, Sequence[int]]:
        """By layer, the tokens that each expert was chosen for."""
        return {} if self._engine is None else self._engine.stats().expert_tokens

    def run(self) -> None:
        """Stay until `stop`; raise what broke the ring otherwise."""
        assert self._engine is not None
        self._engine.wait()

    def stop(self) -> None:
        """End the API, then the engine, then the links."""
        if self._server is not None:
            self._server.stop(DRAIN_S)
        elif self._socket is not None:
            self._socket.close()
        if self._engine is not None:
            self._engine.stop()
        if self._listener is not None:
            self._listener.close()


def _listen(links: LinkSetup) -> "LinkListener":
    from ..cluster.links.link import LinkListener

    return LinkListener(
        host=links.listen_host,
        secret=links.secret,
        deployment=links.deployment,
        epoch=links.epoch,
    )


def _held_experts(stage: StagePlan, num_experts: int) -> Mapping[int, Sequence[int]] | None:
    """By layer what the stage holds itself; None: everything, and it has no helpers."""
    if not stage.helpers:
        return None
    every = (tuple(range(num_experts)),) * (stage.end_layer - stage.first_layer)
    return dict(enumerate(stage.experts or every, start=stage.first_layer))


def _join_ring(
    links: LinkSetup, listener: "LinkListener", downstream: str
) -> tuple["TcpLink", "TcpLink"]:
    """The links from the neighbour before and to the one after.

    Everybody dials first: a listener answers while nobody accepts yet.
    """
    next_link = _dial(links, downstream)
    try:
        return listener.accept(LINK_TIMEOUT_S), next_link
    except BaseException:
        next_link.close()
        raise


def _dial(links: LinkSetup, address: str) -> "TcpLink":
    from ..cluster.links.link import dial

    return dial(
        address,
        secret=links.secret,
        deployment=links.deployment,
        epoch=links.epoch,
        timeout_s=LINK_TIMEOUT_S,
    )
