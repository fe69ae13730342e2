"""``POST /v1/completions``: text or token ids in, the text that follows out."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .disconnect import unless_client_leaves
from .generation import Delta, Job, encode_off_loop, generate_all, plan_jobs
from .protocol import CompletionBody, parse_body
from .request_body import read_body
from .served_model import ServedModel
from .sse import EventStream
from .usage import UsageCount, finite

_Json = dict[str, Any]


async def answer_completion(request: Request) -> Response:
    """The endpoint."""
    model: ServedModel = request.app.state.model
    body = parse_body(await read_body(request), CompletionBody)
    model.check_name(body.model)
    num_chars = sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str))
    prompts = await encode_off_loop(num_chars, _encode_prompts, model, body)
    jobs = plan_jobs(
        model,
        body,
        prompts,
        max_tokens=body.max_tokens,
        num_logprobs=body.logprobs,
        seed=body.seed,
        lead=[
            ""
            if not body.echo
            else prompt
            if isinstance(prompt, str)
            else model.tokenizer.decode(prompt)
            for prompt in body.prompt
        ],
    )
    usage = UsageCount(prompt_tokens=sum(map(len, prompts)))
    envelope = {
        "id": f"cmpl-{uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        return EventStream(_stream(model, body, jobs, usage, envelope))
    choices = await unless_client_leaves(request.receive, _collect(model, body, jobs, usage))
    return JSONResponse({**envelope, "choices": choices, "usage": usage.body})


def _encode_prompts(model: ServedModel, body: CompletionBody) -> list[tuple[int, ...]]:
    return [
        tuple(
            model.tokenizer.encode(prompt, add_bos=body.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
        )
        for prompt in body.prompt
    ]


async def _collect(
    model: ServedModel, body: CompletionBody, jobs: Sequence[Job], usage: UsageCount
) -> list[_Json]:
    deltas: list[list[Delta]] = [[] for _ in jobs]
    if body.max_tokens > 0:
        async for index, delta in generate_all(model, jobs):
            usage.completion_tokens += 1
            deltas[index].append(delta)
    choices = []
    for index, (job, own) in enumerate(zip(jobs, deltas, strict=True)):
        choice: _Json = {
            "index": index,
            "text": job.lead + "".join(delta.text for delta in own),
            "logprobs": None if body.logprobs is None else _logprobs(model, body.logprobs, own),
            "finish_reason": own[-1].finish_reason if own else "length",
        }
        if body.return_token_ids:
            choice["prompt_token_ids"] = list(job.prompt_ids)
            choice["token_ids"] = [delta.event.token_id for delta in own]
        choices.append(choice)
    return choices


async def _stream(
    model: ServedModel,
    body: CompletionBody,
    jobs: Sequence[Job],
    usage: UsageCount,
    envelope: _Json,
) -> AsyncGenerator[_Json, None]:
    def chunk(
        index: int,
        text: str,
        *,
        deltas: Sequence[Delta] = (),
        finish_reason: str | None = None,
        first: bool = False,
    ) -> _Json:
        choice: _Json = {
            "index": index,
            "text": text,
            "logprobs": None
            if body.logprobs is None or not deltas
            else _logprobs(model, body.logprobs, deltas),
            "finish_reason": finish_reason,
        }
        if body.return_token_ids:
            if first:
                choice["prompt_token_ids"] = list(jobs[index].prompt_ids)
            choice["token_ids"] = [delta.event.token_id for delta in deltas]
        message = {**envelope, "choices": [choice]}
        if body.usage_in_chunks:
            message["usage"] = usage.body
        elif body.usage_at_end:
            message["usage"] = None
        return message

    waiting = set(range(len(jobs)))
    if body.max_tokens == 0:
        for index, job in enumerate(jobs):
            yield chunk(index, job.lead, finish_reason="length", first=True)
    else:
        answers = generate_all(model, jobs)
        try:
            async for index, delta in answers:
                usage.completion_tokens += 1
                first = index in waiting
                waiting.discard(index)
                text = jobs[index].lead + delta.text if first else delta.text
                # A token whose text is held back says nothing, unless its ids were asked for.
                if (
                    text
                    or delta.finish_reason
                    or body.return_token_ids
                    or body.logprobs is not None
                ):
                    yield chunk(
                        index,
                        text,
                        deltas=(delta,),
                        finish_reason=delta.finish_reason,
                        first=first,
                    )
        finally:
            await answers.aclose()
    if body.usage_at_end:
        yield {**envelope, "choices": [], "usage": usage.body}


def _logprobs(model: ServedModel, num_logprobs: int, deltas: Sequence[Delta]) -> _Json:
    """OpenAI's parallel lists; the sampled token is among the top ones with the same float."""
    name = model.tokenizer.token_name
    tops: list[_Json] = []
    for delta in deltas:
        top: _Json = {name(delta.event.token_id): finite(delta.event.logprob)}
        for token_id, logprob in delta.event.top_logprobs[:num_logprobs]:
            top.setdefault(name(token_id), finite(logprob))
        tops.append(top)
    return {
        "tokens": [name(delta.event.token_id) for delta in deltas],
        "token_logprobs": [finite(delta.event.logprob) for delta in deltas],
        "top_logprobs": tops,
        "text_offset": [delta.text_offset for delta in deltas],
    }
