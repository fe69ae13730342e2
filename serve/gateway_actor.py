"""The actor with the API, and an engine for each pipeline behind it."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..cluster.deployment.assignment import GatewayAssignment, RingAssignment
from ..errors import StageLostError
from ..fetcher.checkpoint.release import ReleaseFacts, facts_from_json
from .api.server import Server, bind
from .ring import join_ring, listen
from .text.load import load_tokenizer
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..cluster.links.listener import LinkListener
    from .engine.engine import Engine
    from .engine.router import Routed, Router

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
        # Of each pipeline by its number, and of its newest start.
        self._rings: dict[int, RingAssignment] = {}
        self._listeners: dict[int, LinkListener] = {}
        self._engines: dict[int, Engine] = {}
        self._router: Router | None = None
        self._server: Server | None = None
        self._stopped = threading.Event()

    def bind(self) -> int:
        """Take the port; nobody is answered yet."""
        host, port = self._wish
        self._socket = bind(host, port, has_api_key=self._api_key is not None)
        return int(self._socket.getsockname()[1])

    def brief(self, assignment: GatewayAssignment) -> None:
        """Read the tokenizer."""
        # A second of imports that `connect` would take when all the stages are ready.
        from .engine.engine import Engine  # noqa: F401

        self._assignment = assignment
        self._facts = facts_from_json(assignment.facts_json)
        self._tokenizer = load_tokenizer(Path(assignment.folder), self._facts)

    def listen(self, pipeline: int, ring: RingAssignment) -> str:
        """Open the link on which the last stage answers; end what an earlier start has left."""
        if (before := self._listeners.pop(pipeline, None)) is not None:
            before.close()
        if (lost := self._engines.get(pipeline)) is not None:
            # Its stages are gone, so that it ends by itself, and callers hear of what.
            with contextlib.suppress(StageLostError):
                if not lost.wait(ENDING_S):
                    lost.stop()
        self._rings[pipeline] = ring
        self._listeners[pipeline] = listener = listen(ring.links)
        return listener.address

    def connect(self, pipeline: int, downstream: str) -> None:
        """Close the ring and start the engine."""
        from .engine.engine import Engine

        given, facts, ring = self._assignment, self._facts, self._rings[pipeline]
        assert given is not None
        assert facts is not None
        assert self._tokenizer is not None
        upstream, first_stage = join_ring(ring.links, self._listeners[pipeline], downstream)
        self._engines[pipeline] = engine = Engine(
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
            name=f"engine of pipeline {pipeline}" if given.num_pipelines > 1 else "engine",
        )
        engine.start()

    def warm(self, pipeline: int) -> float:
        """Seconds that one token took through every stage."""
        return asyncio.run(self._engines[pipeline].probe())

    def serve(self) -> str:
        """Answer requests from now on."""
        from .api.app import create_app
        from .engine.router import Router

        given, facts = self._assignment, self._facts
        assert given is not None
        assert facts is not None
        assert self._tokenizer is not None
        assert self._socket is not None
        self._router = Router([self._routed(number) for number in range(given.num_pipelines)])
        app = create_app(
            engine=self._router,
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

    def admit(self, pipeline: int) -> None:
        """Let requests go to a pipeline that was started again."""
        assert self._router is not None
        self._router.replace(pipeline, self._routed(pipeline))

    def _routed(self, pipeline: int) -> "Routed":
        from .engine.router import Routed

        ring = self._rings[pipeline]
        return Routed(
            engine=self._engines[pipeline], speed=ring.speed, max_running=ring.max_running
        )

    def run(self) -> None:
        """Stay until `stop`."""
        self._stopped.wait()

    def expert_tokens(self) -> Mapping[int, Sequence[int]]:
        """By layer, the tokens that each expert was chosen for, in all pipelines together."""
        return {} if self._router is None else self._router.stats().expert_tokens

    def ending(self, pipeline: int) -> None:
        """Raise what broke the ring of this pipeline, if that is known within a moment."""
        self._engines[pipeline].wait(ENDING_S)

    def stop(self) -> None:
        """End the API, then the engines, then the links."""
        if self._router is not None:
            self._router.close()
        if self._server is not None:
            self._server.stop(DRAIN_S)
        elif self._socket is not None:
            self._socket.close()
        for engine in list(self._engines.values()):
            engine.stop()
        for listener in list(self._listeners.values()):
            listener.close()
        self._stopped.set()
