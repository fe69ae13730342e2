"""The engine of one pipeline: requests in, tokens out, steps around the ring in between.

One thread owns the scheduler. Everything that happens to it (a request, a client that left, a
frame from the last stage, the end) comes through one inbox, so nothing is locked. asyncio lives
only on the callers' side: tokens are handed to their loops.
"""

import asyncio
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field

from ..cluster.footprint import STEP_TOKENS
from ..cluster.link import Frame, StageLink
from ..errors import MagnetarError, QueueFullError, StageLostError, UsageError
from ..fetcher.config import ModelConfig
from .request import GenerationParams, Request, TokenEvent
from .scheduler import Scheduler
from .step import SamplingParams
from .step_codec import decode_result, encode_plan

logger = logging.getLogger(__name__)

MAX_RUNNING = 64
"""Requests that hold KV blocks at once; beyond that a CPU gains nothing from larger steps."""
MAX_WAITING = 256
"""Requests that may wait for KV blocks; the API answers 429 beyond."""
STEP_DEADLINE_S = 300.0
"""A step that takes longer is lost: the largest prompt chunk takes seconds on a slow CPU."""
FRESH_S = 5.0
"""While steps complete, the last one's time is as good as a probe's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot, taken between two events."""

    running: int
    waiting: int
    steps_in_flight: int
    num_kv_blocks: int
    kv_blocks_free: int


@dataclass(eq=False, slots=True)
class _Stream:
    """The way back to one caller. Holds at most the events of its request's tokens."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | MagnetarError] = field(default_factory=asyncio.Queue)

    def deliver(self, event: TokenEvent | MagnetarError) -> None:
        """Hand an event to the caller's loop; a loop that is gone asks for nothing any more."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            logger.debug("the caller's loop is closed")


@dataclass(frozen=True, slots=True)
class _Add:
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Abort:
    stream: _Stream


@dataclass(frozen=True, slots=True)
class _Lost:
    error: StageLostError


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Event = _Add | _Abort | _Lost | _Stop | Frame


class Engine:
    """Serves requests over one ring of stages until a link dies or `stop`."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        num_kv_blocks: int,
        max_context_tokens: int,
        max_concurrency: int,
        num_stages: int,
        downstream: StageLink,
        upstream: StageLink,
        eos_token_ids: Collection[int],
        epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes both links over: `downstream` to the first stage, `upstream` from the last."""
        self._scheduler = Scheduler(
            num_kv_blocks=num_kv_blocks,
            max_context_tokens=max_context_tokens,
            max_running=max(MAX_RUNNING, max_concurrency),
            max_step_tokens=STEP_TOKENS,
            num_stages=num_stages,
            eos_token_ids=frozenset(eos_token_ids),
        )
        self._num_kv_blocks = num_kv_blocks
        self._vocab_size = config.vocab_size
        self._downstream = downstream
        self._upstream = upstream
        self._epoch = epoch
        self._clock = clock
        self._inbox: queue.Queue[_Event] = queue.Queue()
        self._streams: dict[int, _Stream] = {}
        self._request_ids: dict[_Stream, int] = {}
        self._sent_at: deque[float] = deque()
        self._last_step: tuple[float, float] | None = None
        """When the last step came back, and the seconds it took."""
        self._next_request_id = 0
        self._lost: StageLostError | None = None
        self._stopping = False
        self._stats = self._snapshot()
        self._threads = (
            threading.Thread(target=self._run, name="engine", daemon=True),
            threading.Thread(target=self._receive, name="engine-receive", daemon=True),
        )

    def start(self) -> None:
        """Begin to serve."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the links, fail what still runs, and wait for the threads."""
        self._inbox.put(_Stop())
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def stats(self) -> EngineStats:
        """How busy the engine is; never blocks."""
        return self._stats

    async def generate(
        self, prompt_ids: Sequence[int], params: GenerationParams
    ) -> AsyncGenerator[TokenEvent, None]:
        """One event per token, the last with a finish reason. Closing it aborts the request.

        Raises:
            UsageError: the prompt is empty, has an unknown token, or cannot fit with its answer.
            QueueFullError: too many requests wait already.
            StageLostError: a stage or its link died, or the engine stopped.
        """
        unknown = [token for token in prompt_ids if not 0 <= token < self._vocab_size]
        if unknown:
            raise UsageError(
                f"token {unknown[0]} is not in the vocabulary of {self._vocab_size} tokens"
            )
        stream = _Stream(asyncio.get_running_loop())
        self._inbox.put(_Add(tuple(prompt_ids), params, stream))
        finished = False
        try:
            while not finished:
                event = await stream.events.get()
                finished = isinstance(event, MagnetarError) or event.finish_reason is not None
                if isinstance(event, MagnetarError):
                    raise event
                yield event
        finally:
            if not finished:
                self._inbox.put(_Abort(stream))

    async def probe(self) -> float:
        """Seconds that a step takes around the ring: a new one, or the last while busy.

        Raises:
            StageLostError: the ring is broken.
        """
        if self._lost is not None:
            raise self._lost
        if self._last_step is not None and self._clock() - self._last_step[0] < FRESH_S:
            return self._last_step[1]
        started_at = self._clock()
        params = GenerationParams(
            max_tokens=1, ignore_eos=True, sampling=SamplingParams(temperature=0.0)
        )
        async for _ in self.generate((0,), params):
            pass
        return self._clock() - started_at

    def _run(self) -> None:
        try:
            while self._lost is None:
                self._handle(self._next_event())
                while self._lost is None and not self._inbox.empty():
                    self._handle(self._inbox.get())
                self._send_steps()
                self._stats = self._snapshot()
        except Exception as error:  # a defect; the callers must not wait for ever
            logger.exception("the engine failed")
            self._lose(StageLostError(f"the engine failed: {error}"))
        finally:
            self._downstream.close()
            self._upstream.close()
        # Whoever still comes is told at once; the thread ends with `stop`.
        while not self._stopping:
            event = self._inbox.get()
            self._stopping = isinstance(event, _Stop)
            if isinstance(event, _Add):
                event.stream.deliver(self._farewell())

    def _next_event(self) -> _Event:
        """Wait for one; a step that does not come back in time is an event too."""
        if not self._sent_at:
            return self._inbox.get()
        try:
            left_s = self._sent_at[0] + STEP_DEADLINE_S - self._clock()
            return self._inbox.get(timeout=max(left_s, 0.0))
        except queue.Empty:
            return _Lost(StageLostError(f"a step did not come back in {STEP_DEADLINE_S:g} s"))

    def _handle(self, event: _Event) -> None:
        if isinstance(event, _Add):
            self._add(event)
        elif isinstance(event, _Abort):
            request_id = self._request_ids.pop(event.stream, None)
            if request_id is not None:
                del self._streams[request_id]
                self._scheduler.abort(request_id)
        elif isinstance(event, _Lost):
            self._lose(event.error)
        elif isinstance(event, _Stop):
            self._stopping = True
            self._lose(StageLostError("the server is stopping; ask again later"))
        elif event.kind == "result":
            self._complete(event)
        else:
            self._lose(StageLostError(f"a stage failed: {json.loads(event.body)}"))

    def _add(self, event: _Add) -> None:
        if self._scheduler.num_waiting >= MAX_WAITING:
            event.stream.deliver(
                QueueFullError(f"{MAX_WAITING} requests wait already; try again later")
            )
            return
        request_id = self._next_request_id
        request = Request(request_id=request_id, prompt_ids=event.prompt_ids, params=event.params)
        try:
            self._scheduler.add(request)
        except UsageError as error:
            event.stream.deliver(error)
            return
        self._next_request_id += 1
        self._streams[request_id] = event.stream
        self._request_ids[event.stream] = request_id

    def _complete(self, frame: Frame) -> None:
        now, sent_at = self._clock(), self._sent_at.popleft()
        self._last_step = (now, now - sent_at)
        events = self._scheduler.complete(decode_result(frame.step_id, frame.body))
        self._stats = self._snapshot()  # whoever hears the last token finds the blocks free
        for request_id, event in events:
            stream = self._streams[request_id]
            if event.finish_reason is not None:
                del self._streams[request_id], self._request_ids[stream]
            stream.deliver(event)

    def _send_steps(self) -> None:
        while self._lost is None and (plan := self._scheduler.schedule()) is not None:
            self._sent_at.append(self._clock())
            frame = Frame(
                kind="step", epoch=self._epoch, step_id=plan.step_id, body=encode_plan(plan)
            )
            try:
                self._downstream.send(frame)
            except StageLostError as error:
                self._lose(error)

    def _lose(self, error: StageLostError) -> None:
        """Fail every request; later ones fail at once."""
        self._lost = error
        for request_id, stream in self._streams.items():
            self._scheduler.abort(request_id)
            stream.deliver(self._farewell())
        self._streams.clear()
        self._request_ids.clear()
        self._stats = self._snapshot()

    def _farewell(self) -> StageLostError:
        """A fresh error for each caller: a raised one carries its traceback along."""
        return StageLostError(str(self._lost))

    def _receive(self) -> None:
        try:
            while True:
                self._inbox.put(self._upstream.receive())
        except StageLostError as error:
            self._inbox.put(_Lost(error))

    def _snapshot(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            steps_in_flight=scheduler.num_in_flight,
            num_kv_blocks=self._num_kv_blocks,
            kv_blocks_free=scheduler.num_free_blocks,
        )
