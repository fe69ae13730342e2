"""Decides what every step computes: state in, plan out; no torch, no clock, no threads.

There are no phases of prefill and decode. A step gives tokens to requests, under one budget, until
every token a request has is computed; the last known token of a request is sampled from. That one
rule covers prompts in chunks, decoding and the return of preempted requests (as vLLM's v1 does).

Several steps are in flight at once. A request whose next token is awaited has nothing to compute
and is passed over; a long prompt may have several chunks on their way.

A preempted request takes the path of its first run again: its prompt in the same rows, and each
token of its answer in a row of its own. In floating point the same tokens round otherwise in rows
of another length, and where two of them are nearly as likely the rest of an answer would turn out
differently (vllm#54993, vllm#5543). It is always so, not only in reproducible mode, because it
costs little: the tokens are known, so that one step takes as many such rows as requests may run,
and reads the weights once for all of them. An answer of 500 tokens is back after eight steps of a
size that decoding has too. Of the cache such a request takes no more than lets its next row begin
where one did before; prompts are therefore cut at the borders of blocks. What is left to chance,
outside of reproducible mode, is what else is computed in the same steps.

An answer that another scheduler began goes on here in the same way: as if it had been preempted,
but for the rows of its prompt, which nobody remembers.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from ...cluster.footprint import STEP_TOKENS
from ...errors import UsageError
from ...settings import KV_BLOCK_TOKENS
from .admission import Admission
from .blocks import blocks_for
from .request import FinishReason, Request, TokenEvent
from .step import Sample, StepPlan, StepResult, StepRow

_BY_LAST_STEP = attrgetter("last_step_id")


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step whose result has not come."""

    step_id: int
    sampled: tuple[int, ...]
    """Requests that get a token, in the order of the rows."""


class Scheduler:
    """Gives each step its tokens, and the requests theirs.

    Which requests may take part, and with which KV blocks, `Admission` decides.
    """

    def __init__(
        self,
        *,
        num_kv_blocks: int,
        max_context_tokens: int,
        max_running: int,
        num_stages: int,
        eos_token_ids: frozenset[int] = frozenset(),
        max_step_tokens: int = STEP_TOKENS,
    ) -> None:
        if min(num_kv_blocks, max_context_tokens, max_running, num_stages, max_step_tokens) < 1:
            raise ValueError("every size of a scheduler must be at least 1")
        self._admission = Admission(num_kv_blocks=num_kv_blocks, max_running=max_running)
        self._max_context_tokens = max_context_tokens
        self._max_running = max_running
        self._num_stages = num_stages
        self._eos_token_ids = eos_token_ids
        # A row of every running request must fit into a step, or one might starve.
        self._max_step_tokens = max(max_step_tokens, max_running)
        self._in_flight: deque[_Flight] = deque()
        self._filling: list[Request] = []
        """Requests with blocks that the step in the making fills."""
        self._next_step_id = 0

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks."""
        return len(self._admission.running)

    @property
    def num_waiting(self) -> int:
        """Requests without KV blocks, preempted ones included."""
        return len(self._admission.waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps whose result has not come."""
        return len(self._in_flight)

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that nobody reads; their contents may still be found by others."""
        return self._admission.num_free_blocks

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._admission.requests)

    @property
    def num_preemptions(self) -> int:
        """How often a running request had to give its blocks back."""
        return self._admission.num_preemptions

    @property
    def num_cache_queries(self) -> int:
        """Tokens of prompts that were looked for in the KV cache."""
        return self._admission.num_cache_queries

    @property
    def num_cache_hits(self) -> int:
        """Those that were there."""
        return self._admission.num_cache_hits

    def holds(self, digest: bytes) -> bool:
        """Whether a KV block with this digest can be found now. Any thread may ask."""
        return self._admission.holds(digest)

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuse a request that could never be finished. Any thread may ask.

        Raises:
            UsageError: it is empty, or longer than the context or all KV blocks together.
        """
        if num_prompt_tokens < 1 or max_tokens < 1:
            raise UsageError(
                f"a prompt of {num_prompt_tokens} tokens and an answer of {max_tokens}; "
                "both need at least one"
            )
        num_tokens = num_prompt_tokens + max_tokens
        asked = f"{num_prompt_tokens} tokens of prompt and {max_tokens} of answer"
        if num_tokens > self._max_context_tokens:
            raise UsageError(
                f"{asked} are more than the context of {self._max_context_tokens}; "
                "shorten the prompt or lower max_tokens"
            )
        # The last token of an answer is never computed with.
        needed = blocks_for(num_tokens - 1)
        num_blocks = self._admission.num_blocks
        if needed > num_blocks:
            raise UsageError(
                f"{asked} need {needed} KV blocks and there are {num_blocks}; "
                "shorten the prompt, lower max_tokens, or give the deployment more memory"
            )

    def add(self, request: Request) -> None:
        """Let a request wait; raises as `check`."""
        self.check(len(request.prompt_ids), request.params.max_tokens)
        request.end_ids = request.params.stop_token_ids
        if not request.params.ignore_eos:
            request.end_ids |= self._eos_token_ids
        self._admission.add(request)

    def abort(self, request_id: int) -> None:
        """Forget a request now, whatever of it is in flight; unknown ones are ignored."""
        if request := self._admission.requests.get(request_id):
            self._admission.remove(request)

    def schedule(self) -> StepPlan | None:
        """The next step, or None: nothing can be computed now, or enough is in flight.

        Each stage has one step to compute, and one more is on its way to the first.
        """
        if len(self._in_flight) > self._num_stages:
            return None
        # Decoding pays when steps are full. Were samples awaited from more steps than there are
        # stages, requests that once fell into different steps would never come together again.
        may_sample = sum(bool(flight.sampled) for flight in self._in_flight) < self._num_stages
        rows: list[StepRow] = []
        if may_sample:
            rows += self._decode_rows()
        rows += self._prefill_rows(len(rows), may_sample=may_sample)
        if not rows:
            return None
        for request in self._filling:
            self._admission.publish(request)
        self._filling.clear()
        released = self._admission.take_released()
        plan = StepPlan(step_id=self._next_step_id, rows=tuple(rows), released=released)
        sampled = tuple([row.request_id for row in rows if row.sampling is not None])
        self._in_flight.append(_Flight(plan.step_id, sampled))
        self._next_step_id += 1
        return plan

    def complete(self, result: StepResult) -> list[tuple[int, TokenEvent]]:
        """Take the result of the oldest step in flight; the tokens by request id.

        Samples of requests that were aborted meanwhile are dropped. A finished request is
        forgotten.

        Raises:
            ValueError: it is not the result of that step.
        """
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise ValueError(f"the result of step {result.step_id} came out of turn")
        sampled = tuple(sample.request_id for sample in result.samples)
        if sampled != self._in_flight[0].sampled:
            raise ValueError(f"step {result.step_id} brought tokens that were not asked for")
        self._in_flight.popleft()
        events = []
        for sample in result.samples:
            if request := self._admission.requests.get(sample.request_id):
                events.append((request.request_id, self._append(request, sample)))
        return events

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls. For tests: slow."""
        self._admission.check_integrity()
        assert len(self._in_flight) <= self._num_stages + 1
        awaited = [key for flight in self._in_flight for key in flight.sampled]
        assert len(set(awaited)) == len(awaited), "two tokens of one request are in flight"
        for request in self._admission.requests.values():
            assert request.awaits_sample == (request.request_id in awaited)
            assert not (request.awaits_sample and request.block_ids and request.num_unscheduled)

    def _decode_rows(self) -> list[StepRow]:
        """One token each of the requests that have waited longest since their last step.

        At most an even share of those that decode, so that every stage has some to compute: of
        several caps tried for vLLM this one paid, +23 % output (vllm#57433).
        """
        ready = []
        num_decoding = 0
        for request in self._admission.running:
            # `Request.decodes` in place: a step has 64 rows and 100 µs.
            num_unscheduled = len(request.token_ids) - request.num_scheduled
            if num_unscheduled <= 1 and request.num_scheduled > 0:
                num_decoding += 1
                if num_unscheduled:
                    ready.append(request)
        share = -(-num_decoding // self._num_stages)
        ready.sort(key=_BY_LAST_STEP)
        rows: list[StepRow] = []
        for request in ready:
            if len(rows) == share:
                break
            # Making room for one may preempt another that comes later in this list.
            num_slots = len(request.block_ids) * KV_BLOCK_TOKENS
            if num_slots and (
                num_slots >= len(request.token_ids)
                or self._admission.make_room(request, step_id=self._next_step_id)
            ):
                rows.append(self._row(request, 1))
        return rows

    def _prefill_rows(self, num_decoding: int, *, may_sample: bool) -> Iterator[StepRow]:
        """Chunks of what is not computed yet, beside so many rows that decode.

        A row that is computed again is not cut: the first of a step may go beyond the budget, by no
        more than those that decode.
        """
        budget = self._max_step_tokens - num_decoding
        num_single = self._max_running - num_decoding
        is_first = True
        for request in self._prefilling() if budget else ():
            while num_unscheduled := request.num_unscheduled:
                is_again = request.next_end() is not None
                num_tokens = self._num_tokens(request, budget, is_first=is_first)
                if num_tokens == 0:
                    return
                if num_tokens == num_unscheduled and not may_sample:
                    break
                if num_tokens == 1 and request.num_generated:
                    if num_single == 0:
                        break
                    num_single -= 1
                yield self._row(request, num_tokens)
                is_first = False
                budget -= num_tokens
                if budget <= 0:
                    return
                if not is_again:
                    break

    def _num_tokens(self, request: Request, budget: int, *, is_first: bool) -> int:
        """Of the request's next row: as in its first run, or as many as the budget allows.

        0 where it must wait for a step in which it comes first, or it would be cut small.
        """
        start = request.num_scheduled
        if (end := request.next_end()) is not None:
            # What was found in the cache then may be longer than any row.
            num_tokens = min(end - start, self._max_step_tokens)
            return num_tokens if is_first or num_tokens <= budget else 0
        # An answer that was begun elsewhere comes later, in rows of one token.
        num_left = len(request.prompt_ids) - start
        if num_left <= budget:
            return num_left
        whole = (start + budget) // KV_BLOCK_TOKENS * KV_BLOCK_TOKENS - start
        return whole if whole > 0 else budget if is_first else 0

    def _prefilling(self) -> Iterator[Request]:
        """Running requests whose prompts are not computed, and then as many more as there is room
        for, even those of which only one token is left to compute."""
        yield from [request for request in self._admission.running if not request.decodes]
        while (request := self._admission.admit()) is not None:
            yield request

    def _row(self, request: Request, num_tokens: int) -> StepRow:
        """The request's next tokens as part of the step that is being made."""
        row = request.row(num_tokens)
        end = request.num_scheduled + num_tokens
        if end <= len(request.prompt_ids):  # spares 64 calls that would do nothing
            request.note_end(end)
        request.num_scheduled = end
        request.num_blocks_sent = len(request.block_ids)
        request.awaits_sample = row.sampling is not None
        request.last_step_id = self._next_step_id
        if end // KV_BLOCK_TOKENS > request.num_published:
            self._filling.append(request)
        return row

    def _append(self, request: Request, sample: Sample) -> TokenEvent:
        if not sample.is_finite:
            # Numbers that are not finite spread to all tokens of a row, also to those before, which
            # others would take for their own.
            self._admission.forget(request)
            return TokenEvent(token_id=0, finish_reason="abort", is_finite=False)
        request.token_ids.append(sample.token_id)
        if request.matcher is not None:
            request.matcher.accept(sample.token_id)
        request.awaits_sample = False
        params = request.params
        finish_reason: FinishReason | None = None
        if sample.token_id in request.end_ids:
            finish_reason = "stop"
        elif request.num_generated == params.max_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            self._admission.remove(request)
        return TokenEvent(
            token_id=sample.token_id,
            logprob=sample.logprob,
            top_logprobs=sample.top_logprobs,
            scored=sample.scored,
            vector=sample.vector,
            num_cached_tokens=(request.num_cached_tokens or 0) if request.num_generated == 1 else 0,
            finish_reason=finish_reason,
        )
