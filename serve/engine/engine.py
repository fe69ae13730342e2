"""The engine of one pipeline: requests in, tokens out, steps around the ring in between.

One thread owns the scheduler, sends the steps, and waits for their results. What callers want of it
comes through one inbox: a request, a client that left, the end. asyncio lives only on the callers'
side; tokens are handed to their loops.

Between a result and the next step the stages have nothing to do where one client decodes alone, so
that what can wait comes after the step: a second thread for the results took 0.1 ms a token.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ...cluster.footprint import STEP_TOKENS
from ...cluster.links.link import ALIVE_S, StageLink
from ...errors import NotFiniteError, QueueFullError, StageLostError, UsageError
from ...fetcher.config import ModelConfig
from .callers import Callers, Probe, Stream
from .pipeline import Arrival, Pipeline, Traffic
from .request import GenerationParams, Request, TokenEvent
from .scheduler import Scheduler
from .stats import EngineStats
from .step import SamplingParams

logger = logging.getLogger(__name__)

STOP_S = 1.0
"""How long `stop` leaves the thread to what it is at; a frame may stop half way for far longer."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request
    stream: Stream


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: int


_Message = _Add | _Abort | Probe


class Engine:
    """Serves requests over one ring of stages until it breaks, or `stop`. An engine runs once."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        num_kv_blocks: int,
        max_context_tokens: int,
        max_running: int,
        max_waiting: int,
        num_stages: int,
        downstream: StageLink,
        upstream: StageLink,
        eos_token_ids: Collection[int],
        max_step_tokens: int | None = None,
        name: str = "engine",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes both links over: `downstream` to the first stage, `upstream` from the last.

        At most `max_running` requests hold KV blocks at once. That they may not all fit at full
        length is meant: most are short, and the scheduler preempts when blocks run out. Besides, at
        most `max_waiting` wait for theirs. A step has `max_step_tokens` at most, or `STEP_TOKENS`.
        `name` is for logs.
        """
        self._scheduler = Scheduler(
            num_kv_blocks=num_kv_blocks,
            max_context_tokens=max_context_tokens,
            max_running=max_running,
            num_stages=num_stages,
            eos_token_ids=frozenset(eos_token_ids),
            max_step_tokens=max_step_tokens or STEP_TOKENS,
        )
        # Unbounded in type only: at most `max_waiting` requests and their aborts, and the probes
        # that somebody waits for.
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._pipeline = Pipeline(downstream=downstream, upstream=upstream, clock=clock)
        self._max_waiting = max_waiting
        self._vocab_size = config.vocab_size
        self._num_kv_blocks = num_kv_blocks
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_stopping = threading.Event()
        # What the engine's thread alone touches.
        self._callers = Callers()
        self._probes: list[Probe] = []
        self._expert_tokens: Mapping[int, tuple[int, ...]] = {}
        self._num_taken = 0
        """Requests taken from the inbox since the last statistics."""
        # What callers touch too, under the lock.
        self._lock = threading.Lock()
        self._next_request_id = 0
        self._num_unseen = 0
        """Requests that the last statistics do not count yet."""
        self._stats = EngineStats(num_kv_blocks=num_kv_blocks, kv_blocks_free=num_kv_blocks)
        self._over: StageLostError | None = None
        self._was_stopped = False

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what still runs, close the links, and wait for the threads."""
        self._is_stopping.set()
        self._pipeline.wake()
        if self._thread.ident is None:
            self._end(_stopping(), was_stopped=True)
            self._pipeline.close()
            return
        self._thread.join(STOP_S)
        self._pipeline.close()  # which wakes a thread that waits for the rest of a frame
        self._thread.join()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; False when `timeout_s` passes first, True after `stop`.

        Raises:
            StageLostError: the ring broke.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        with self._lock:
            if not self._was_stopped:
                self._check_open()
        return True

    def stats(self) -> EngineStats:
        """How busy the engine is; requests count from the moment they are accepted."""
        with self._lock:
            return replace(self._stats, waiting=self._stats.waiting + self._num_unseen)

    @property
    def lost(self) -> StageLostError | None:
        """What broke the ring; None while it serves, and after `stop`."""
        with self._lock:
            return None if self._was_stopped else self._over

    def holds(self, digest: bytes) -> bool:
        """Whether the KV cache has the block with this digest now (see `blocks.py`)."""
        return self._scheduler.holds(digest)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        *,
        begun_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """One event per token, the last with a finish reason. Closing it aborts the request.

        With `begun_ids` the request was accepted by another engine, which gave these tokens of the
        answer: it goes on behind them, and waits whoever else does.

        Raises:
            UsageError: the prompt is empty, has an unknown token, or cannot fit with its answer.
            QueueFullError: too many requests wait already.
            StageLostError: a stage or its link died, or the engine stopped.
            NotFiniteError: its numbers overflowed; the engine and other requests go on.
        """
        stream = self._add(tuple(prompt_ids), params, begun_ids)
        is_over = False
        try:
            while not is_over:
                event = await stream.next()
                is_over = event.finish_reason is not None
                if not event.is_finite:
                    raise NotFiniteError(
                        "the numbers of this request overflowed, so that there is no answer to it; "
                        "serve the model with --dtype bf16 or fp32, or change the prompt"
                    )
                yield event
        finally:
            if not is_over:
                self._tell(_Abort(stream.request_id))

    async def probe(self) -> float:
        """Seconds that a step takes around the ring: the next one, or one of its own when idle.

        Raises:
            StageLostError: the ring is broken.
        """
        loop = asyncio.get_running_loop()
        probe = Probe(loop, loop.create_future())
        with self._lock:
            self._check_open()
            self._tell(probe)
        return await probe.seconds

    def _add(
        self,
        prompt_ids: tuple[int, ...],
        params: GenerationParams,
        begun_ids: Sequence[int] | None,
    ) -> Stream:
        if unknown := [token for token in prompt_ids if not 0 <= token < self._vocab_size]:
            raise UsageError(
                f"token {unknown[0]} is not in the vocabulary of {self._vocab_size} tokens"
            )
        self._scheduler.check(len(prompt_ids), params.max_tokens)
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_open()
            num_waiting = self._stats.waiting + self._num_unseen
            if begun_ids is None and num_waiting >= self._max_waiting:
                raise QueueFullError(f"{num_waiting} requests wait already; try again later")
            # Ids ascend in the order of the inbox, because both are under the lock.
            stream = Stream(self._new_request_id(), loop)
            request = Request(
                request_id=stream.request_id,
                prompt_ids=prompt_ids,
                params=params,
                begun_ids=tuple(begun_ids or ()),
            )
            self._num_unseen += 1
            self._tell(_Add(request, stream))
        return stream

    def _new_request_id(self) -> int:
        request_id = self._next_request_id
        self._next_request_id += 1
        return request_id

    def _tell(self, message: _Message) -> None:
        self._inbox.put(message)
        self._pipeline.wake()

    def _check_open(self) -> None:
        if self._over is not None:
            # A fresh one for each caller: a raised error carries its traceback along.
            raise StageLostError(str(self._over))

    def _run(self) -> None:
        over = stopped = _stopping()
        try:
            while not self._is_stopping.is_set():
                # Full stages come first; callers can wait for the moment that this takes.
                self._send_steps()
                self._publish()
                self._deliver()
                self._pipeline.check()
                self._take_messages()
        except StageLostError as error:
            if not self._is_stopping.is_set():  # else it is `stop` that closed the links
                logger.error("the %s ends: %s", self._thread.name, error)
                over = error
        except Exception as error:  # a defect; the callers must not wait for ever
            logger.exception("the %s failed", self._thread.name)
            over = StageLostError(f"the engine failed: {error!r}")
        self._end(over, was_stopped=over is stopped)
        self._pipeline.close()

    def _take_messages(self) -> None:
        """Wait for a result or a message, then take it and all messages there are."""
        match self._pipeline.receive(ALIVE_S):
            case Arrival() as arrival:
                self._complete(arrival)
            case Traffic() as traffic:
                self._expert_tokens = {**self._expert_tokens, **traffic.expert_tokens}
        while not self._inbox.empty():
            self._handle(self._inbox.get_nowait())

    def _handle(self, message: _Message) -> None:
        match message:
            case _Add():
                self._num_taken += 1
                self._callers.attach(message.stream)
                self._scheduler.add(message.request)
            case _Abort():
                self._callers.detach(message.request_id)
                self._scheduler.abort(message.request_id)
            case Probe():
                self._probes.append(message)

    def _complete(self, arrival: Arrival) -> None:
        try:
            events = self._scheduler.complete(arrival.result)
        except ValueError as error:
            raise StageLostError(f"the stages answer what was not asked: {error}") from error
        for request_id, event in events:
            self._callers.collect(request_id, event)
        seconds = self._pipeline.took(arrival)
        for probe in self._probes:
            if probe.step_id == arrival.result.step_id:
                probe.measured_s = seconds

    def _send_steps(self) -> None:
        unmeasured = [probe for probe in self._probes if probe.step_id is None]
        if unmeasured and not self._scheduler.has_requests:
            self._add_probe_request()
        while (plan := self._scheduler.schedule()) is not None:
            for probe in unmeasured:
                probe.step_id = plan.step_id
            unmeasured = []
            self._pipeline.send(plan)

    def _add_probe_request(self) -> None:
        """One token for nobody; the engine is idle, so there is room."""
        with self._lock:
            request_id = self._new_request_id()
        params = GenerationParams(
            max_tokens=1, ignore_eos=True, sampling=SamplingParams(temperature=0.0)
        )
        self._scheduler.add(Request(request_id=request_id, prompt_ids=(0,), params=params))

    def _publish(self) -> None:
        scheduler = self._scheduler
        with self._lock:
            self._num_unseen -= self._num_taken
            self._num_taken = 0
            self._stats = EngineStats(
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                steps_in_flight=scheduler.num_in_flight,
                num_kv_blocks=self._num_kv_blocks,
                kv_blocks_free=scheduler.num_free_blocks,
                num_preemptions=scheduler.num_preemptions,
                num_cache_queries=scheduler.num_cache_queries,
                num_cache_hits=scheduler.num_cache_hits,
                expert_tokens=self._expert_tokens,
            )

    def _deliver(self) -> None:
        """Tell callers what is new, after the statistics say so too."""
        for request_id in self._callers.deliver():
            self._handle(_Abort(request_id))
        for probe in [probe for probe in self._probes if probe.measured_s is not None]:
            self._probes.remove(probe)
            probe.resolve()

    def _end(self, error: StageLostError, *, was_stopped: bool = False) -> None:
        """Fail every request, probe and later caller."""
        with self._lock:
            self._over = error
            self._was_stopped = was_stopped
            self._num_unseen = 0
            self._stats = replace(
                self._stats,
                running=0,
                waiting=0,
                steps_in_flight=0,
                kv_blocks_free=self._num_kv_blocks,
                is_over=True,
            )
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            if isinstance(message, _Add):
                self._callers.attach(message.stream)
            elif isinstance(message, Probe):
                self._probes.append(message)
        self._callers.fail(error)
        for probe in self._probes:
            probe.reject(StageLostError(str(error)))
        self._probes.clear()


def _stopping() -> StageLostError:
    return StageLostError("the server is stopping; send the request again later")
