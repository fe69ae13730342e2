"""``POST /v1/chat/completions``: a conversation in, the assistant's next message out."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine.step import ScoredToken
from ..text.chat import SAFETY_PROMPT, TEXT_PART_JOINS, ChatMessage, encode_chat
from .disconnect import unless_client_leaves
from .errors import ApiError
from .generation import Delta, Job, encode_off_loop, generate_all, plan_jobs
from .logprobs import by_token_id
from .protocol import ChatBody, MessageBody, parse_body
from .request_body import read_body
from .served_model import ServedModel
from .sse import EventStream
from .structured_output import compile_grammar
from .usage import UsageCount, chunk_usage, finite

_Json = dict[str, Any]


async def answer_chat(request: Request) -> Response:
    """The endpoint."""
    model: ServedModel = request.app.state.model
    body = parse_body(await read_body(request), ChatBody)
    model.check_name(body.model)
    messages = read_messages(model, body.messages)
    if body.safe_prompt or body.safe_mode:
        messages.insert(0, ChatMessage(role="system", content=SAFETY_PROMPT))
    num_chars = sum(len(message.content) for message in messages)
    prompt_ids = tuple(
        await encode_off_loop(num_chars, encode_chat, messages, model.tokenizer, model.chat_format)
    )
    lead = messages[-1].content if messages[-1].prefix else ""
    jobs = plan_jobs(
        model,
        body,
        [prompt_ids],
        max_tokens=body.max_tokens or body.max_completion_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        seed=body.seed if body.seed is not None else body.random_seed,
        num_prompt_logprobs=body.prompt_logprobs,
        grammar=await compile_grammar(model.grammars, body),
        lead=[lead],
        at_start=True,
    )
    usage = UsageCount(prompt_tokens=len(prompt_ids))
    envelope = {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model.name,
    }
    if body.stream:
        return EventStream(_stream(model, body, jobs, usage, envelope))
    choices, scored = await unless_client_leaves(
        request.receive, _collect(model, body, jobs, usage)
    )
    answer: _Json = {**envelope, "choices": choices, "usage": usage.body}
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = by_token_id(model, scored, body.prompt_logprobs)
    if body.return_token_ids:
        answer["prompt_token_ids"] = list(prompt_ids)
    return JSONResponse(answer)


def read_messages(model: ServedModel, messages: Sequence[MessageBody]) -> list[ChatMessage]:
    """A conversation as the model's chat format takes it.

    Raises:
        ApiError: the model was not trained to chat.
    """
    if model.chat_format == "none":
        raise ApiError(
            400,
            f"{model.name} is a base model: it completes text and was not trained to chat."
            " Use POST /v1/completions.",
            code="base_model",
        )
    joint = TEXT_PART_JOINS[model.chat_format]
    return [
        ChatMessage(
            role=message.role,
            content=message.content
            if isinstance(message.content, str)
            else joint.join(part.text for part in message.content if part.text),
            prefix=message.prefix,
        )
        for message in messages
    ]


async def _collect(
    model: ServedModel, body: ChatBody, jobs: Sequence[Job], usage: UsageCount
) -> tuple[list[_Json], tuple[ScoredToken, ...]]:
    """The choices, and how likely the prompt was, if that was asked."""
    deltas: list[list[Delta]] = [[] for _ in jobs]
    async for index, delta in generate_all(model, jobs):
        usage.add(delta.event, choice=index % body.n)
        deltas[index].append(delta)
    choices = []
    for index, (job, own) in enumerate(zip(jobs, deltas, strict=True)):
        choice: _Json = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": job.lead + "".join(delta.text for delta in own),
            },
            "logprobs": _logprobs(model, body, own),
            "finish_reason": own[-1].finish_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = [delta.event.token_id for delta in own]
        choices.append(choice)
    return choices, deltas[0][0].event.scored


async def _stream(
    model: ServedModel,
    body: ChatBody,
    jobs: Sequence[Job],
    usage: UsageCount,
    envelope: _Json,
) -> AsyncGenerator[_Json, None]:
    def chunk(index: int, delta: Delta, content: str, *, first: bool) -> _Json:
        choice: _Json = {
            "index": index,
            "delta": {"role": "assistant", "content": content} if first else {"content": content},
            "logprobs": _logprobs(model, body, (delta,)),
            "finish_reason": delta.finish_reason,
        }
        message = {**envelope, "choices": [choice], **chunk_usage(body, usage)}
        if body.return_token_ids:
            choice["token_ids"] = [delta.event.token_id]
            if first:
                message["prompt_token_ids"] = list(jobs[index].prompt_ids)
        return message

    waiting = set(range(len(jobs)))
    answers = generate_all(model, jobs)
    try:
        async for index, delta in answers:
            usage.add(delta.event, choice=index % body.n)
            first = index in waiting
            waiting.discard(index)
            content = jobs[index].lead + delta.text if first else delta.text
            # A token whose text is held back says nothing, unless its id was asked for.
            if content or first or delta.finish_reason or body.return_token_ids or body.logprobs:
                yield chunk(index, delta, content, first=first)
    finally:
        await answers.aclose()
    if body.usage_at_end:
        yield {**envelope, "choices": [], "usage": usage.body}


def _logprobs(model: ServedModel, body: ChatBody, deltas: Sequence[Delta]) -> _Json | None:
    if not body.logprobs:
        return None

    def entry(token_id: int, logprob: float | None) -> _Json:
        tokenizer = model.tokenizer
        return {
            "token": tokenizer.token_name(token_id),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    num_top = body.top_logprobs or 0
    return {
        "content": [
            entry(delta.event.token_id, delta.event.logprob)
            | {"top_logprobs": [entry(*top) for top in delta.event.top_logprobs[:num_top]]}
            for delta in deltas
        ],
        "refusal": None,
    }
