"""``POST /v1/completions``: text or token ids in, the text that follows out."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine.step import ScoredToken
from .disconnect import unless_client_leaves
from .generation import Delta, Job, encode_each, generate_all, plan_jobs
from .logprobs import by_name, by_token_id, offsets
from .protocol import CompletionBody, parse_body
from .request_body import read_body
from .served_model import ServedModel
from .sse import EventStream
from .structured_output import compile_grammar
from .usage import UsageCount, chunk_usage, finite

_Json = dict[str, Any]


async def answer_completion(request: Request) -> Response:
    """The endpoint."""
    model: ServedModel = request.app.state.model
    body = parse_body(await read_body(request), CompletionBody)
    model.check_name(body.model)
    prompts = await encode_each(model, body.prompt, add_bos=body.add_special_tokens)
    jobs = plan_jobs(
        model,
        body,
        prompts,
        max_tokens=body.max_tokens,
        num_logprobs=body.logprobs,
        seed=body.seed,
        num_prompt_logprobs=body.num_prompt_logprobs,
        grammar=await compile_grammar(model.grammars, body),
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


async def _collect(
    model: ServedModel, body: CompletionBody, jobs: Sequence[Job], usage: UsageCount
) -> list[_Json]:
    deltas: list[list[Delta]] = [[] for _ in jobs]
    scored: list[tuple[ScoredToken, ...]] = [()] * len(jobs)
    if body.max_tokens > 0 or body.num_prompt_logprobs is not None:
        async for index, delta in generate_all(model, jobs):
            scored[index] = scored[index] or delta.event.scored
            if body.max_tokens > 0:
                usage.add(delta.event, choice=index % body.n)
                deltas[index].append(delta)
    choices = []
    for index, (job, own) in enumerate(zip(jobs, deltas, strict=True)):
        choice: _Json = {
            "index": index,
            "text": job.lead + "".join(delta.text for delta in own),
            "logprobs": _logprobs(model, body, job, own, scored[index] if body.echo else None),
            "finish_reason": own[-1].finish_reason if own else "length",
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = by_token_id(model, scored[index], body.prompt_logprobs)
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
        scored: Sequence[ScoredToken] = (),
        finish_reason: str | None = None,
        first: bool = False,
    ) -> _Json:
        echoed = scored if first and body.echo else None
        choice: _Json = {
            "index": index,
            "text": text,
            "logprobs": _logprobs(model, body, jobs[index], deltas, echoed),
            "finish_reason": finish_reason,
        }
        if body.return_token_ids:
            if first:
                choice["prompt_token_ids"] = list(jobs[index].prompt_ids)
            choice["token_ids"] = [delta.event.token_id for delta in deltas]
        return {**envelope, "choices": [choice], **chunk_usage(body, usage)}

    waiting = set(range(len(jobs)))
    if body.max_tokens == 0 and body.num_prompt_logprobs is None:
        for index, job in enumerate(jobs):
            yield chunk(index, job.lead, finish_reason="length", first=True)
    else:
        answers = generate_all(model, jobs)
        try:
            async for index, delta in answers:
                first = index in waiting
                waiting.discard(index)
                scored = delta.event.scored
                if body.max_tokens == 0:  # the one token is nobody's
                    lead = jobs[index].lead
                    yield chunk(index, lead, scored=scored, finish_reason="length", first=True)
                    continue
                usage.add(delta.event, choice=index % body.n)
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
                        scored=scored,
                        finish_reason=delta.finish_reason,
                        first=first,
                    )
        finally:
            await answers.aclose()
    if body.usage_at_end:
        yield {**envelope, "choices": [], "usage": usage.body}


def _logprobs(
    model: ServedModel,
    body: CompletionBody,
    job: Job,
    deltas: Sequence[Delta],
    echoed: Sequence[ScoredToken] | None,
) -> _Json | None:
    """OpenAI's parallel lists; each token is among the top ones of its place, with one float.

    With `echoed` they begin with the prompt, whose first token has no log-probability.
    """
    if body.logprobs is None:
        return None
    name = model.tokenizer.token_name
    events = [delta.event for delta in deltas]
    lists: _Json = {
        "tokens": [name(event.token_id) for event in events],
        "token_logprobs": [finite(event.logprob) for event in events],
        "top_logprobs": [by_name(model, event, body.logprobs) for event in events],
        "text_offset": [delta.text_offset for delta in deltas],
    }
    if echoed is None:
        return lists
    prompt_ids = job.prompt_ids
    return {
        "tokens": [*map(name, prompt_ids), *lists["tokens"]],
        "token_logprobs": [
            None,
            *(finite(token.logprob) for token in echoed),
            *lists["token_logprobs"],
        ],
        "top_logprobs": [
            None,
            *(by_name(model, token, body.logprobs) for token in echoed),
            *lists["top_logprobs"],
        ],
        "text_offset": [*offsets(model, prompt_ids), *lists["text_offset"]],
    }
