"""An engine without a model: it answers what the test says, and keeps a diary."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from magnetar.errors import NotFiniteError, QueueFullError, StageLostError
from magnetar.serve.engine.request import GenerationParams, TokenEvent
from magnetar.serve.engine.stats import EngineStats
from magnetar.serve.engine.step import ScoredToken

Reply = Callable[[Sequence[int], GenerationParams], Iterable[int]]


@dataclass(kw_only=True)
class FakeEngine:
    """Keeps the rules of `Engine.generate` for the tokens that `reply` gives.

    Logprobs are made up from the token's position: -0.5, -1.5, ...; the top ones are the sampled
    token and those after it. A prompt's are -0.25, -0.5, ... with the token itself the second best.
    """

    reply: Reply
    eos_token_ids: frozenset[int] = frozenset()
    fail_after: int | None = None
    """Lose a stage after so many tokens."""
    abort_after: int | None = None
    hold_after: int | None = None
    """Give so many tokens, then none until `release`."""
    queue_is_full: bool = False
    overflows: bool = False
    probe_error: Exception | None = None
    probe_hangs: bool = False
    num_probes: int = 0
    requests: list[tuple[tuple[int, ...], GenerationParams]] = field(default_factory=list)
    num_running: int = 0
    num_aborted: int = 0
    holds: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)

    async def generate(
        self, prompt_ids: Sequence[int], params: GenerationParams
    ) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append((tuple(prompt_ids), params))
        if self.queue_is_full:
            raise QueueFullError("256 requests wait already; try again later")
        if self.overflows:
            raise NotFiniteError("the numbers of this request overflowed")
        self.num_running += 1
        finished = False
        try:
            for index, token_id in enumerate(self.reply(prompt_ids, params)):
                if index == self.fail_after:
                    raise StageLostError("stage 1 on host b is gone; it is being restarted.")
                if index == self.hold_after:
                    released = asyncio.Event()
                    self.holds.append((asyncio.get_running_loop(), released))
                    await released.wait()
                await asyncio.sleep(0)
                event = self._event(index, token_id, params)
                if index == 0:
                    event = replace(
                        event,
                        scored=_scored(prompt_ids, params.num_prompt_logprobs),
                        vector=(0.6, 0.8) if params.pooling else (),
                    )
                finished = event.finish_reason is not None
                yield event
                if finished:
                    return
        finally:
            self.num_running -= 1
            self.num_aborted += not finished

    def release(self) -> None:
        """Let the requests held by `hold_after` go on; may be called from any thread."""
        for loop, released in self.holds:
            loop.call_soon_threadsafe(released.set)

    def _event(self, index: int, token_id: int, params: GenerationParams) -> TokenEvent:
        stops = params.stop_token_ids | (frozenset() if params.ignore_eos else self.eos_token_ids)
        num_logprobs = params.sampling.num_logprobs
        return TokenEvent(
            token_id=token_id,
            logprob=None if num_logprobs is None else -0.5 - index,
            top_logprobs=tuple(
                (token_id + rank, -0.5 - index - rank) for rank in range(num_logprobs or 0)
            ),
            finish_reason="abort"
            if index == self.abort_after
            else "stop"
            if token_id in stops
            else "length"
            if index + 1 == params.max_tokens
            else None,
        )

    async def probe(self) -> float:
        self.num_probes += 1
        if self.probe_hangs:
            await asyncio.Event().wait()
        if self.probe_error is not None:
            raise self.probe_error
        return 0.002

    def stats(self) -> EngineStats:
        return EngineStats(running=self.num_running, num_kv_blocks=8, kv_blocks_free=6)


def _scored(prompt_ids: Sequence[int], num_top: int | None) -> tuple[ScoredToken, ...]:
    if num_top is None:
        return ()
    return tuple(
        ScoredToken(
            token_id=token_id,
            logprob=-0.25 * index,
            rank=2,
            top_logprobs=((token_id + 1, -0.125 * index), (token_id, -0.25 * index))[:num_top],
        )
        for index, token_id in enumerate(prompt_ids)
        if index > 0
    )
