"""The fields that hold an answer to a grammar: OpenAI's and vLLM's names."""

import asyncio
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ...errors import UsageError
from ..text.grammar import CompiledGrammar, GrammarCompiler, GrammarSource
from .errors import ApiError

MAX_DEPTH = 32
COMPILE_S = 1.0
_ANY_OBJECT = GrammarSource(kind="json", text='{"type":"object"}')


def _as_object(value: object) -> object:
    """vLLM takes a schema as text too."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise PydanticCustomError("json_schema", "not valid JSON") from None


_Schema = Annotated[dict[str, Any], BeforeValidator(_as_object)]
_Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=512)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JsonSchemaFormat(_Part):
    """`response_format.json_schema`; whether `strict` or not, the schema is kept to."""

    name: str = ""
    description: str | None = None
    schema_: _Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "response_format", "`json_schema` belongs to the type `json_schema` and to no other"
            )
        return self


class StructuredOutputs(_Part):
    """vLLM's `structured_outputs`; one of them."""

    json_: _Schema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredFields(_Part):
    """Part of the body of every request for text."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> "StructuredFields":
        if len(self._sources()) > 1:
            raise PydanticCustomError(
                "structured_outputs",
                "an answer keeps to one grammar; of `response_format`, `structured_outputs` and"
                " `guided_...` give one",
            )
        return self

    @property
    def grammar_source(self) -> GrammarSource | None:
        """What the answer must be; None for any text."""
        return next(iter(self._sources()), None)

    def _sources(self) -> list[GrammarSource]:
        wanted, format_ = self.structured_outputs, self.response_format
        schemas = [self.guided_json]
        regexes, grammars = [self.guided_regex], [self.guided_grammar]
        choices = [self.guided_choice]
        sources: list[GrammarSource] = []
        if wanted is not None:
            schemas.append(wanted.json_)
            regexes.append(wanted.regex)
            grammars.append(wanted.grammar)
            choices.append(wanted.choice)
            if wanted.json_object:
                sources.append(_ANY_OBJECT)
        if format_ is not None and format_.type == "json_object":
            sources.append(_ANY_OBJECT)
        if format_ is not None and format_.json_schema is not None:
            schemas.append(format_.json_schema.schema_)
        for schema in schemas:
            if schema is not None:
                sources.append(GrammarSource(kind="json", text=json.dumps(schema)))
        for choice in choices:
            if choice is not None:
                regexes.append("|".join(map(re.escape, choice)))
        sources += [GrammarSource(kind="regex", text=text) for text in regexes if text is not None]
        sources += [GrammarSource(kind="lark", text=text) for text in grammars if text is not None]
        return sources


async def compile_grammar(
    grammars: GrammarCompiler, fields: StructuredFields
) -> CompiledGrammar | None:
    """The grammar of a request, compiled in a thread; None where any text will do.

    Raises:
        ApiError: 400, it is too large, too deep, too slow, or not sound.
    """
    source = fields.grammar_source
    if source is None:
        return None
    if _depth(source.text) > MAX_DEPTH:
        raise _refused(f"it nests more than {MAX_DEPTH} brackets; make it flatter")
    await asyncio.to_thread(grammars.prepare)
    try:
        async with asyncio.timeout(COMPILE_S):
            return await asyncio.to_thread(grammars.compile, source)
    except TimeoutError:
        raise _refused(f"compiling took more than {COMPILE_S:g} s; make it simpler") from None
    except UsageError as error:
        raise _refused(str(error)) from None


def _refused(reason: str) -> ApiError:
    return ApiError(400, f"Structured output: {reason}.", code="invalid_grammar")


def _depth(text: str) -> int:
    """How deep brackets nest, whatever they mean; escaped ones do not count."""
    depth = deepest = 0
    for mark in re.findall(r"\\.|[\[({\])}]", text, re.DOTALL):
        if mark in "[({":
            depth += 1
            deepest = max(deepest, depth)
        elif mark in "])}":
            depth = max(depth - 1, 0)
    return deepest
