"""The actor with the API, and an engine for each pipeline behind it."""

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..cluster.deployment.assignment import GatewayAssignment, RingAssignment
from ..fetcher.checkpoint.release import ReleaseFacts, facts_from_json
from .api.server import Server, bind
from .ring import join_ring, listen
from .text.load import load_tokenizer
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..cluster.links.listener import LinkListener
    from .api.served_model import EngineLike
    from .engine.engine import Engine

DRAIN_S: Final = 5.0
"""For answers that run when the deployment is stopped."""
ENDING_S: Final = 0.5
"""For an engine whose stages have ended to notice; the cause passes the ring in a moment."""


class GatewayActor:
    """Plays `cluster.deployment.assignment.GatewayRole`."""

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        self._wish = (host, port)
        self._api_key = api_key
        self._socket: socket.socket | None = None
        self._facts: ReleaseFacts | None = None
        self._tokenizer: Tokenizer | None = None
        self._assignment: GatewayAssignment | None = None
        # Of each pipeline.
        self._listeners: list[LinkListener] = []
        self._engines: list[Engine] = []
        self._server: Server | None = None

    def bind(self) -> int:
        """Take the port; nobody is answered yet."""
        host, port = self._wish
        self._socket = bind(host, port, has_api_key=self._api_key is not None)
        return int(self._socket.getsockname()[1])

    def listen(self, assignment: GatewayAssignment) -> tuple[str, ...]:
        """Read the tokenizer and open the links on which the last stages answer."""
        # A second of imports that `connect` would take when all the stages are ready.
        from .engine.engine import Engine  # noqa: F401

        self._assignment = assignment
        self._facts = facts_from_json(assignment.facts_json)
        self._tokenizer = load_tokenizer(Path(assignment.folder), self._facts)
        self._listeners = [listen(ring.links) for ring in assignment.rings]
        return tuple(listener.address for listener in self._listeners)

    def connect(self, downstreams: Sequence[str]) -> None:
        """Close the rings and start the engines."""
        assert self._assignment is not None
        rings = self._assignment.rings
        joined = zip(rings, self._listeners, downstreams, strict=True)
        for number, (ring, listener, downstream) in enumerate(joined):
            name = f"engine of pipeline {number}" if len(rings) > 1 else "engine"
            engine = self._engine_of(ring, listener, downstream, name)
            self._engines.append(engine)
            engine.start()

    def _engine_of(
        self, ring: RingAssignment, listener: "LinkListener", downstream: str, name: str
    ) -> "Engine":
        from .engine.engine import Engine

        given, facts = self._assignment, self._facts
        assert given is not None
        assert facts is not None
        assert self._tokenizer is not None
        upstream, first_stage = join_ring(ring.links, listener, downstream)
        return Engine(
            config=facts.config,
            num_kv_blocks=ring.num_kv_blocks,
            max_context_tokens=given.max_context_tokens,
            max_running=ring.max_running,
            max_waiting=ring.max_waiting,
            num_stages=ring.num_stages,
            max_step_tokens=ring.max_step_tokens,
            downstream=first_stage,
            upstream=upstream,
            eos_token_ids=self._tokenizer.eos_ids,
            name=name,
        )

    def warm(self) -> tuple[float, ...]:
        """Seconds that one token took through every stage of each pipeline."""

        async def probe_all() -> list[float]:
            return await asyncio.gather(*(engine.probe() for engine in self._engines))

        return tuple(asyncio.run(probe_all()))

    def serve(self) -> str:
        """Answer requests from now on."""
        from .api.app import create_app

        given, facts = self._assignment, self._facts
        assert given is not None
        assert facts is not None
        assert self._tokenizer is not None
        assert self._socket is not None
        app = create_app(
            engine=self._served(given.rings),
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

    def _served(self, rings: Sequence[RingAssignment]) -> "EngineLike":
        """The engine, or what plays one in front of several."""
        from .engine.router import Routed, Router

        if len(self._engines) == 1:
            return self._engines[0]
        return Router(
            [
                Routed(engine=engine, speed=ring.speed, max_running=ring.max_running)
                for engine, ring in zip(self._engines, rings, strict=True)
            ]
        )

    def expert_tokens(self) -> Mapping[int, Sequence[int]]:
        """By layer, the tokens that each expert was chosen for, in all pipelines together."""
        from .engine.stats import total

        stats = [engine.stats() for engine in self._engines]
        return total(stats).expert_tokens if stats else {}

    def ending(self, pipeline: int) -> None:
        """Raise what broke the ring of this pipeline, if that is known within a moment."""
        self._engines[pipeline].wait(ENDING_S)

    def stop(self) -> None:
        """End the API, then the engines, then the links."""
        if self._server is not None:
            self._server.stop(DRAIN_S)
        elif self._socket is not None:
            self._socket.close()
        for engine in self._engines:
            engine.stop()
        for listener in self._listeners:
            listener.close()
