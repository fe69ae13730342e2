"""From prompt tokens to text: one answer of the engine, or several at once."""

import asyncio
import inspect
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, TypeVar

from ...errors import StageLostError
from ..engine.request import GenerationParams, Grammar, TokenEvent
from ..engine.step import SamplingParams
from ..text.detokenizer import Detokenizer, StopFilter
from .errors import ApiError
from .protocol import GenerationBody
from .served_model import ServedModel

_MAX_BUFFERED_DELTAS = 256
_LONG_TEXT_CHARS = 10_000

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One answer to make."""

    prompt_ids: tuple[int, ...]
    params: GenerationParams
    stops: tuple[str, ...]
    at_start: bool
    """Whether the answer begins a text, see `Detokenizer`."""
    lead: str = ""
    """Text that the answer begins with and that is not generated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one token adds to an answer."""

    text: str
    """Without what is held back: half letters and the beginnings of stop strings."""
    event: TokenEvent
    text_offset: int
    """Where the token's text begins in the answer, its `lead` included."""
    finish_reason: Literal["stop", "length"] | None = None


async def encode_off_loop(
    num_chars: int, encode: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs
) -> _R:
    """`encode(...)`, in a thread when the text is long: 2 MiB take half a second and more."""
    if num_chars < _LONG_TEXT_CHARS:
        return encode(*args, **kwargs)
    return await asyncio.to_thread(encode, *args, **kwargs)


async def encode_each(
    model: ServedModel, prompts: Sequence[str | list[int]], *, add_bos: bool
) -> list[tuple[int, ...]]:
    """The token ids of texts; what is token ids already stays as it is."""

    def encode() -> list[tuple[int, ...]]:
        return [
            tuple(
                model.tokenizer.encode(prompt, add_bos=add_bos)
                if isinstance(prompt, str)
                else prompt
            )
            for prompt in prompts
        ]

    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    return await encode_off_loop(num_chars, encode)


def plan_jobs(
    model: ServedModel,
    body: GenerationBody,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    seed: int | None,
    lead: Sequence[str],
    num_prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    at_start: bool | None = None,
) -> list[Job]:
    """`body.n` answers to each prompt, in the order of the choices.

    `max_tokens` None fills the context; with 0 and a prompt that is scored, a token is generated
    all the same. `at_start` None: whether the prompt has no text.

    Raises:
        ApiError: a prompt that leaves no room, a minimum above the maximum, or a token id that the
            tokenizer does not have.
    """
    check_ids(model, body.stop_token_ids, param="stop_token_ids")
    logit_bias = tuple((int(token_id), bias) for token_id, bias in body.logit_bias.items())
    check_ids(model, [token_id for token_id, _ in logit_bias], param="logit_bias")
    if max_tokens == 0 and num_prompt_logprobs is not None:
        max_tokens = 1
    first_seed = secrets.randbits(63) if seed is None else seed % 2**63
    jobs = []
    for index, prompt_ids in enumerate(prompts):
        room = room_for_answer(model, prompt_ids, max_tokens)
        if body.min_tokens > room:
            raise ApiError(
                400,
                f"An answer of at least {body.min_tokens} tokens is asked for, and of at most"
                f" {room}; lower min_tokens.",
                param="min_tokens",
            )
        starts = at_start
        if starts is None:
            starts = all(map(model.tokenizer.is_control, prompt_ids))
        for choice in range(body.n):
            sampling = SamplingParams(
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=max(body.top_k, 0),
                # Any odd constant keeps the seeds of the choices apart.
                seed=(first_seed + choice * 0x9E3779B97F4A7C15) % 2**63,
                num_logprobs=num_logprobs,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=logit_bias,
            )
            params = GenerationParams(
                sampling=sampling,
                max_tokens=room,
                stop_token_ids=frozenset(body.stop_token_ids),
                ignore_eos=body.ignore_eos,
                min_tokens=body.min_tokens,
                grammar=grammar,
                num_prompt_logprobs=num_prompt_logprobs,
                reads_cache=num_prompt_logprobs is None,
                priority=body.priority,
                cache_salt=body.cache_salt,
            )
            jobs.append(
                Job(
                    prompt_ids=prompt_ids,
                    params=params,
                    stops=tuple(body.stop),
                    at_start=starts and not lead[index],
                    lead=lead[index],
                )
            )
    return jobs


def check_ids(model: ServedModel, token_ids: Sequence[int], *, param: str) -> None:
    """Raises ApiError for a token id that the tokenizer does not have."""
    vocab_size = model.tokenizer.vocab_size
    if stray := next((id for id in token_ids if not 0 <= id < vocab_size), None):
        raise ApiError(
            400, f"Token id {stray} is not in the vocabulary of {vocab_size}.", param=param
        )


def room_for_answer(
    model: ServedModel,
    prompt_ids: tuple[int, ...],
    max_tokens: int | None,
    *,
    param: str = "prompt",
) -> int:
    """How many tokens may follow a prompt: `max_tokens`, or with None as many as fit.

    Raises:
        ApiError: the prompt, in the field `param`, is empty or leaves no room.
    """
    if not prompt_ids:
        raise ApiError(400, "The prompt has no tokens; give some text.", param=param)
    check_ids(model, prompt_ids, param=param)
    room = model.max_context_tokens - len(prompt_ids)
    if room < (1 if max_tokens is None else max_tokens):
        asked = "" if max_tokens is None else f" and {max_tokens} more are asked for"
        raise ApiError(
            400,
            f"The context holds {model.max_context_tokens} tokens; the prompt has"
            f" {len(prompt_ids)}{asked}. Shorten the prompt"
            + (" or lower max_tokens." if max_tokens is not None else "."),
            code="context_length_exceeded",
        )
    return room if max_tokens is None else max_tokens


async def generate(model: ServedModel, job: Job) -> AsyncGenerator[Delta, None]:
    """The answer to one job, a delta per token; the last has a finish reason.

    Closing it aborts the request in the engine.

    Raises:
        StageLostError: the engine lost the model, or was stopped.
    """
    tokenizer = model.tokenizer
    detokenizer = Detokenizer(tokenizer, at_start=job.at_start)
    stop_filter = StopFilter(job.stops)
    num_chars = len(job.lead)
    num_tokens = 0
    events = model.engine.generate(job.prompt_ids, job.params)
    with model.metrics.request(len(job.prompt_ids)) as meter:
        try:
            async for event in events:
                meter.token()
                if event.finish_reason == "abort":
                    raise StageLostError("the server is stopping; send the request again.")
                # The token that ends an answer is no part of its text.
                ends_here = event.finish_reason == "stop"
                text = "" if ends_here else detokenizer.feed(event.token_id)
                if event.finish_reason is not None:
                    text += detokenizer.finish()
                text_offset = num_chars
                num_chars += len(text)
                num_tokens += 1
                shown = text if num_tokens <= job.params.min_tokens else stop_filter.feed(text)
                finish_reason: Literal["stop", "length"] | None = event.finish_reason
                if stop_filter.stopped:
                    finish_reason = "stop"
                elif finish_reason is not None:
                    shown += stop_filter.finish()
                if finish_reason is not None:
                    meter.finished_reason = finish_reason
                yield Delta(
                    text=shown, event=event, text_offset=text_offset, finish_reason=finish_reason
                )
                if finish_reason is not None:
                    return
            raise StageLostError("the engine ended the answer early; send the request again.")
        finally:
            if inspect.isasyncgen(events):
                await events.aclose()


async def generate_all(
    model: ServedModel, jobs: Sequence[Job]
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The answers to all jobs at once, as (index of the job, delta) in order of arrival.

    The first job that fails ends them all; closing it aborts them all.
    """
    if len(jobs) == 1:  # the common case needs no task of its own
        single = generate(model, jobs[0])
        try:
            async for delta in single:
                yield 0, delta
        finally:
            await single.aclose()
        return

    queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(_MAX_BUFFERED_DELTAS)

    async def pump(index: int, job: Job) -> None:
        deltas = generate(model, job)
        try:
            async for delta in deltas:
                await queue.put((index, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)
        finally:
            await deltas.aclose()

    tasks = [asyncio.create_task(pump(index, job)) for index, job in enumerate(jobs)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
