"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, as vLLM has them.

With them lm-eval needs no tokenizer of its own.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..text.chat import encode_chat
from .chat_completions import read_messages
from .generation import check_ids, encode_off_loop
from .protocol import MAX_MESSAGES, Body, MessageBody, parse_body
from .request_body import read_body
from .served_model import ServedModel


class TokenizeBody(Body):
    """The body of ``POST /tokenize``: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    """Whether a text begins with BOS; a conversation is as the chat format has it."""
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either `prompt` or `messages`")
        return self


class DetokenizeBody(Body):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


async def answer_tokenize(request: Request) -> Response:
    """The tokens of a text, or of a conversation up to the answer."""
    model: ServedModel = request.app.state.model
    raw = await read_body(request)
    body = parse_body(raw, TokenizeBody)
    model.check_name(body.model)
    ids = await encode_off_loop(len(raw), _encode, model, body)
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": model.max_context_tokens,
        "tokens": ids,
    }
    if body.return_token_strs:
        answer["token_strs"] = list(map(model.tokenizer.token_name, ids))
    return JSONResponse(answer)


def _encode(model: ServedModel, body: TokenizeBody) -> list[int]:
    tokenizer = model.tokenizer
    if body.messages is not None:
        return encode_chat(read_messages(model, body.messages), tokenizer, model.chat_format)
    assert body.prompt is not None
    # Nothing is generated here, and lm-eval asks for the id of the end token by its name.
    if (control_id := tokenizer.control_id(body.prompt)) is not None:
        begins = tokenizer.encode("", add_bos=body.add_special_tokens)
        return [*begins, control_id]
    return tokenizer.encode(body.prompt, add_bos=body.add_special_tokens)


async def answer_detokenize(request: Request) -> Response:
    """The text of tokens, without control tokens."""
    model: ServedModel = request.app.state.model
    body = parse_body(await read_body(request), DetokenizeBody)
    model.check_name(body.model)
    check_ids(model, body.tokens, param="tokens")
    text = await encode_off_loop(len(body.tokens), model.tokenizer.decode, body.tokens)
    return JSONResponse({"prompt": text})


async def answer_tokenizer_info(request: Request) -> Response:
    """What a client needs to know of the tokenizer."""
    model: ServedModel = request.app.state.model
    tokenizer = model.tokenizer
    bos_id, eos_id = tokenizer.bos_id, min(tokenizer.eos_ids, default=None)
    return JSONResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": model.max_context_tokens,
            "bos_token": None if bos_id is None else tokenizer.token_name(bos_id),
            "eos_token": None if eos_id is None else tokenizer.token_name(eos_id),
        }
    )
