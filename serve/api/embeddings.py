"""``POST /v1/embeddings``: texts in, one vector each out."""

import base64
import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..engine.request import GenerationParams
from ..engine.step import Pooling, SamplingParams
from .disconnect import unless_client_leaves
from .generation import Job, encode_each, generate_all, room_for_answer
from .protocol import Body, as_prompts, parse_body
from .request_body import read_body
from .served_model import ServedModel

MAX_INPUTS = 2048
_AT_ONCE = 32
"""Inputs of one request in the engine at once: the queue is for others too."""


class EmbeddingsBody(Body):
    """The body of the endpoint."""

    model: str | None = None
    input: Annotated[
        list[str | list[int]], BeforeValidator(as_prompts), Field(max_length=MAX_INPUTS)
    ]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "last"
    """Ours: the hidden state of the last token, or the mean of all."""
    add_special_tokens: bool = True
    """vLLM's: whether a text begins with BOS."""


async def answer_embeddings(request: Request) -> Response:
    """The endpoint."""
    model: ServedModel = request.app.state.model
    body = parse_body(await read_body(request), EmbeddingsBody)
    model.check_name(body.model)
    prompts = await encode_each(model, body.input, add_bos=body.add_special_tokens)
    jobs = [_job(model, prompt_ids, body.pooling) for prompt_ids in prompts]
    vectors = await unless_client_leaves(request.receive, _embed(model, jobs))
    num_tokens = sum(map(len, prompts))
    return JSONResponse(
        {
            "id": f"embd-{uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": model.name,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _in_base64(vector) if body.encoding_format == "base64" else vector,
                }
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
    )


def _job(model: ServedModel, prompt_ids: tuple[int, ...], pooling: Pooling) -> Job:
    """The vector comes with the first token of an answer, which is thrown away."""
    params = GenerationParams(
        sampling=SamplingParams(temperature=0.0),
        max_tokens=room_for_answer(model, prompt_ids, 1, param="input"),
        pooling=pooling,
        reads_cache=False,
    )
    return Job(prompt_ids=prompt_ids, params=params, stops=(), at_start=True)


async def _embed(model: ServedModel, jobs: Sequence[Job]) -> list[tuple[float, ...]]:
    vectors: list[tuple[float, ...]] = [()] * len(jobs)
    for first in range(0, len(jobs), _AT_ONCE):
        async for index, delta in generate_all(model, jobs[first : first + _AT_ONCE]):
            vectors[first + index] = delta.event.vector
    return vectors


def _in_base64(vector: Sequence[float]) -> Any:
    """Little-endian fp32, which the numbers are: nothing is lost."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
