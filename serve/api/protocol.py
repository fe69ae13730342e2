"""The bodies of requests, and what a client is told that sends another."""

import difflib
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from ..text.chat import Role
from .errors import ApiError
from .field_policy import BODY_NEUTRAL, MESSAGE_NEUTRAL, without_neutral
from .structured_output import StructuredFields

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_SEQUENCES = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_SALT_CHARS = 1024
MAX_MESSAGES = 4096


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    """What every body has in common: no unknown fields, and no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: the usage so far in every chunk."""


class GenerationBody(Body, StructuredFields):
    """What completions and chat have in common."""

    model: str | None = None
    """None asks for the one model there is."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    logit_bias: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
    ] = Field(default={}, max_length=MAX_BIASES)
    """Token ids, as JSON has only strings for keys."""
    min_tokens: int = Field(default=0, ge=0)
    """vLLM's: tokens before which neither end token nor stop string ends the answer."""
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        BeforeValidator(_as_list),
        Field(max_length=MAX_STOPS),
    ] = []
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default=[], max_length=64)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """vLLM's: log-probabilities of the prompt's tokens, by token id."""
    return_token_ids: bool = False
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    """vLLM's: lower ones are served first."""
    cache_salt: str = Field(default="", max_length=MAX_SALT_CHARS)
    """vLLM's: only requests of one salt share keys and values."""

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "`stream_options` needs `stream`: true")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_come_whole(self) -> "GenerationBody":
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError(
                "prompt_logprobs", "`prompt_logprobs` cannot be streamed; leave out `stream`"
            )
        return self

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def as_prompts(value: object) -> list[str | list[int]]:
    """A string, strings, token ids or lists of token ids, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(
            isinstance(item, list) and item and all(type(id) is int for id in item)
            for item in value
        ):
            return value
    raise PydanticCustomError(
        "prompt", "a string, a list of strings, a list of token ids or a list of such lists"
    )


class CompletionBody(GenerationBody):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[
        list[str | list[int]], BeforeValidator(as_prompts), Field(max_length=MAX_PROMPTS)
    ]
    max_tokens: int = Field(default=16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True
    """vLLM's: whether a prompt of text begins with BOS."""

    @model_validator(mode="after")
    def _combinations(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "`max_tokens` of 0 needs `echo`: true")
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise PydanticCustomError(
                "n",
                "{prompts} prompts times `n` of {n} are more than {limit} sequences;"
                " send several requests",
                {"prompts": len(self.prompt), "n": self.n, "limit": MAX_SEQUENCES},
            )
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many most likely tokens are told for each of the prompt; None: it is not scored."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)


class TextPart(Body):
    """One part of a message's content; other kinds than text are not understood."""

    type: Literal["text"]
    text: str


class MessageBody(Body):
    """One of the `messages`."""

    role: Role
    content: str | list[TextPart] = ""
    prefix: bool = False
    """Mistral's: the answer continues this last message and repeats it."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        data = {key: value for key, value in data.items() if value is not None}
        if data.get("role") == "developer":
            data["role"] = "system"
        return without_neutral(data, MESSAGE_NEUTRAL)


class ChatBody(GenerationBody):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[MessageBody] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    random_seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """Mistral's name for `seed`."""
    safe_prompt: bool = False
    safe_mode: bool = False
    """The name of `safe_prompt` before January 2024."""

    @model_validator(mode="after")
    def _combinations(self) -> "ChatBody":
        for one, other in (("max_tokens", "max_completion_tokens"), ("seed", "random_seed")):
            if None not in (getattr(self, one), getattr(self, other)) and getattr(
                self, one
            ) != getattr(self, other):
                raise PydanticCustomError(
                    other,
                    "`{one}` and `{other}` are two names of the same and differ; give one",
                    {"one": one, "other": other},
                )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "`top_logprobs` needs `logprobs`: true")
        return self


_B = TypeVar("_B", bound=Body)


def parse_body(raw: bytes, body_type: type[_B]) -> _B:
    """Read a request's body.

    Raises:
        ApiError: 400; the message and `param` name the field.
    """
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body is not a JSON object.", code="invalid_json")
    # null is OpenAI's way to say: the default.
    data = {key: value for key, value in data.items() if value is not None}
    try:
        data = without_neutral(data, BODY_NEUTRAL)
        return body_type.model_validate(data)
    except PydanticCustomError as error:
        raise ApiError(400, f"{error.message()}.", param=error.type, code="unsupported") from None
    except ValidationError as error:
        raise _api_error_of_validation(error, body_type) from None


def _api_error_of_validation(error: ValidationError, body_type: type[Body]) -> ApiError:
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    return ApiError(
        400,
        "; ".join(_sentence(detail, body_type) for detail in details[:3]) + ".",
        param=_field_name(first),
        code="unknown_field" if first["type"] == "extra_forbidden" else "invalid_value",
    )


def _field_name(detail: ErrorDetails) -> str | None:
    name = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in ("str", "list[TextPart]"):  # the arms of a union are not fields
            name += f".{part}" if name else part
    if name:
        return name
    return detail["type"] if detail["type"] in _FIELDS_WITH_COMBINATIONS else None


_FIELDS_WITH_COMBINATIONS = frozenset((CompletionBody.model_fields | ChatBody.model_fields).keys())


def _sentence(detail: ErrorDetails, body_type: type[Body]) -> str:
    name = _field_name(detail)
    if detail["type"] == "extra_forbidden":
        known = body_type.model_fields if len(detail["loc"]) == 1 else MessageBody.model_fields
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        return f"`{name}` is not a field of this request{hint}".removesuffix("?")
    if detail["type"] == "missing":
        return f"`{name}` is missing"
    if not detail["loc"] or detail["msg"].startswith("`"):
        return detail["msg"]
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "model_type":
        message = "input should be an object"
    value = repr(detail["input"])
    got = f", not {value}" if len(value) <= 80 else ""
    return f"`{name}`: {message}{got}"
