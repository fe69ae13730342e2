"""Several pipelines of one model as one engine: each request goes to one of them.

Where to is decided by load first, as far as it differs clearly, and by the KV cache then. Routers
of other servers do the same from outside and keep a copy of what each cache should hold (sglang's
and vLLM's a tree of past prompts, with a share of 0.3 that must match and 1.5 times the load as the
limit; Dynamo's is told by events). The engines here are in this process: they are asked themselves,
block by block, and what they say is what is there.

A pipeline that is lost takes no answer with it. All that an answer depends on is its prompt, its
parameters with the seed, and its tokens so far, and these are here: another pipeline goes on with
them, and the client does not notice. Where there is no other, the answer waits for its pipeline to
be started again, and the client notices a pause.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from ...errors import MagnetarError, QueueFullError, StageLostError, UsageError
from ...settings import KV_BLOCK_TOKENS
from .blocks import blocks_for, prompt_digests
from .request import GenerationParams, TokenEvent
from .returns import Returns
from .stats import EngineStats, since, total

BUSIER: Final = 1.5
"""So many times the load of the least busy pipeline are clearly more."""
BUSIER_REQUESTS: Final = 4
"""And so many requests beyond as much load: few more in one step cost each of them little."""
TELLING_SHARE: Final = 0.25
"""Of a prompt, from which on it matters who has it in the cache."""
MAX_FRUITLESS: Final = 2
"""Pipelines that a request may lose one after the other without a token from any of them: it may be
the request that breaks them, and must not take all along."""
MAX_WAIT_S: Final = 120.0
"""For lost pipelines to come back, in all the life of a request; the weights are read meanwhile."""


class PipelineEngine(Protocol):
    """What a router needs of an `Engine`."""

    @property
    def lost(self) -> StageLostError | None:
        """What broke the ring; None while it serves, and after it was stopped."""

    def holds(self, digest: bytes) -> bool:
        """Whether the KV cache has the block with this digest now."""

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        *,
        begun_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """As `Engine.generate`."""

    async def probe(self) -> float:
        """As `Engine.probe`."""

    def stats(self) -> EngineStats:
        """As `Engine.stats`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A pipeline as the next request finds it."""

    num_requests: int
    """That run there or wait."""
    has_room: bool
    """The next one would not wait."""
    speed: float
    """In any unit that is the same for all; above 0."""
    num_cached: int = 0
    """Leading tokens of the prompt that the KV cache holds."""

    @property
    def share(self) -> float:
        """Requests for each unit of speed, with the next one."""
        return (self.num_requests + 1) / self.speed


def preference(loads: Sequence[Load], num_prompt_tokens: int) -> list[int]:
    """The pipelines for a request, the best first: indices of `loads`. Pure.

    Those with room come before those without. Then those that are not clearly busier than the least
    busy one; of them the one that has most of the prompt, then the least busy, then the first.
    """
    with_room = [load for load in loads if load.has_room] or loads
    least = min((load.share for load in with_room), default=0.0)

    def key(index: int) -> tuple[bool, bool, int, float, int]:
        load = loads[index]
        beyond = load.num_requests + 1 - least * load.speed
        is_busier = load.share > BUSIER * least and beyond > BUSIER_REQUESTS
        tells = load.num_cached >= TELLING_SHARE * num_prompt_tokens
        return not load.has_room, is_busier, -load.num_cached * tells, load.share, index

    return sorted(range(len(loads)), key=key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """One of the pipelines of a router."""

    engine: PipelineEngine
    speed: float
    """As `Load.speed`: predicted tokens per second, or else requests at once."""
    max_running: int
    """Requests that run at once, at most."""


class Router:
    """Plays one engine in front of all. For one event loop, but for what any thread may call."""

    def __init__(self, pipelines: Sequence[Routed], *, max_wait_s: float = MAX_WAIT_S) -> None:
        """The engines stay their owner's, who starts and stops them."""
        self._max_wait_s = max_wait_s
        self._num_moved = 0
        self._returns = Returns()
        self._is_closed = False
        # What any thread touches, under the lock.
        self._lock = threading.Lock()
        self._pipelines = list(pipelines)
        self._past: dict[int, EngineStats] = {}
        """Of the engines that a pipeline had before."""

    def replace(self, number: int, routed: Routed) -> None:
        """A pipeline was lost and is back, with another engine. Any thread may call it."""
        with self._lock:
            self._past[number] = self._stats_of(number)
            self._pipelines[number] = routed
        self._returns.tell()

    def close(self) -> None:
        """Nothing comes back any more: whoever waits for that ends now. Any thread may call it."""
        self._is_closed = True
        self._returns.tell()

    async def generate(
        self, prompt_ids: Sequence[int], params: GenerationParams
    ) -> AsyncGenerator[TokenEvent, None]:
        """One event per token; closing it aborts the request. Goes on where a pipeline is lost.

        Raises:
            UsageError: no pipeline can serve it.
            QueueFullError: too many requests wait, in each that could.
            StageLostError: no pipeline is up, none came back in time that could go on with it, or
                they were stopped.
        """
        answer_ids: list[int] = []
        begun_ids: tuple[int, ...] | None = None
        obstacle: MagnetarError = _none_is_up()
        num_fruitless = 0
        patience_s, seen = self._max_wait_s, self._returns.count
        untried = self._preferred(prompt_ids, params)
        while untried:
            routed, num_before = untried.pop(0), len(answer_ids)
            events = routed.engine.generate(prompt_ids, params, begun_ids=begun_ids)
            try:
                async with aclosing(events):
                    async for event in events:
                        answer_ids.append(event.token_id)
                        yield event
                return
            except (QueueFullError, UsageError) as error:  # before the first event only
                if begun_ids is None and not isinstance(obstacle, QueueFullError):
                    obstacle = error
            except StageLostError as error:
                if routed.engine.lost is None:
                    raise  # it was stopped, and so are the others
                num_fruitless = 0 if len(answer_ids) > num_before else num_fruitless + 1
                if num_fruitless == MAX_FRUITLESS:
                    raise
                obstacle, begun_ids = error, tuple(answer_ids)
                seen = self._returns.count
                untried = self._preferred(prompt_ids, params)
                self._num_moved += bool(untried)
            # What was accepted once waits for those that are lost, if no other can go on with it.
            while begun_ids is not None and not untried and self._may_come_back:
                before_s = time.monotonic()
                if not await self._returns.later_than(seen, timeout_s=patience_s):
                    raise obstacle
                patience_s -= time.monotonic() - before_s
                seen = self._returns.count
                untried = self._preferred(prompt_ids, params)
                self._num_moved += bool(untried)
        raise obstacle

    async def probe(self) -> float:
        """Seconds that a step takes around the ring of whichever pipeline answers first.

        Raises:
            StageLostError: none does.
        """
        probes = [asyncio.create_task(each.engine.probe()) for each in self._living]
        error = _none_is_up()
        try:
            for probe in asyncio.as_completed(probes):
                try:
                    return await probe
                except StageLostError as lost:
                    error = lost
        finally:
            for task in probes:
                task.cancel()
        raise error

    def stats(self) -> EngineStats:
        """Sums, and the numbers of each pipeline. Any thread may call it."""
        with self._lock:
            each = [self._stats_of(number) for number in range(len(self._pipelines))]
        return total(each, num_moved=self._num_moved, num_between=self._returns.num_waiting)

    def _stats_of(self, number: int) -> EngineStats:
        now, past = self._pipelines[number].engine.stats(), self._past.get(number)
        return now if past is None else since(past, now)

    @property
    def _living(self) -> list[Routed]:
        return [routed for routed in list(self._pipelines) if routed.engine.lost is None]

    @property
    def _may_come_back(self) -> bool:
        return not self._is_closed and len(self._living) < len(self._pipelines)

    def _preferred(self, prompt_ids: Sequence[int], params: GenerationParams) -> list[Routed]:
        living = self._living
        cached = [0] * len(living)
        if params.reads_cache and len(living) > 1:
            cached = _cached_tokens(living, prompt_ids, params.cache_salt)
        loads = [
            _load(routed, len(prompt_ids), num_cached)
            for routed, num_cached in zip(living, cached, strict=True)
        ]
        return [living[index] for index in preference(loads, len(prompt_ids))]


def _none_is_up() -> StageLostError:
    return StageLostError("no pipeline is up now; lost ones are started again, try it later")


def _cached_tokens(
    pipelines: Sequence[Routed], prompt_ids: Sequence[int], cache_salt: str
) -> list[int]:
    """Of each pipeline; digests are made as far as any of them has the blocks."""
    num_tokens = [0] * len(pipelines)
    holding = list(range(len(pipelines)))
    for digest in prompt_digests(prompt_ids, cache_salt):
        holding = [index for index in holding if pipelines[index].engine.holds(digest)]
        if not holding:
            break
        for index in holding:
            num_tokens[index] += KV_BLOCK_TOKENS
    return num_tokens


def _load(routed: Routed, num_prompt_tokens: int, num_cached: int) -> Load:
    stats = routed.engine.stats()
    num_requests = stats.running + stats.waiting
    # As a scheduler admits: its own blocks, and one for each running request to grow into.
    num_blocks = blocks_for(num_prompt_tokens - num_cached) + num_requests
    return Load(
        num_requests=num_requests,
        has_room=num_requests < routed.max_running and num_blocks <= stats.kv_blocks_free,
        speed=routed.speed,
        num_cached=num_cached,
    )
