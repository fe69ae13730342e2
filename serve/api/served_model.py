"""The one model that the API serves, and what it needs of an engine."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...fetcher.config import ChatFormat
from ..engine.request import GenerationParams, TokenEvent
from ..engine.stats import EngineStats
from ..text.grammar import GrammarCompiler
from ..text.tokenizer import Tokenizer
from .errors import ApiError
from .metrics import Metrics


class EngineLike(Protocol):
    """What the API needs of an engine."""

    def generate(
        self, prompt_ids: Sequence[int], params: GenerationParams
    ) -> AsyncIterator[TokenEvent]:
        """One event per token; closing the iterator aborts the request.

        Raises:
            UsageError: the request cannot be served.
            QueueFullError: too many requests wait.
            StageLostError: the model went away.
        """

    async def probe(self) -> float:
        """Seconds that one token takes through every stage.

        Raises:
            StageLostError: it does not arrive.
        """

    def stats(self) -> EngineStats:
        """How busy it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """The one model behind the API."""

    engine: EngineLike
    tokenizer: Tokenizer
    grammars: GrammarCompiler
    chat_format: ChatFormat
    name: str
    max_context_tokens: int
    created: int
    """Unix time in seconds."""
    metrics: Metrics = field(default_factory=Metrics)

    def check_name(self, asked: str | None) -> None:
        """Raises ApiError 404 unless `asked` is this model or None."""
        if asked is not None and asked != self.name:
            raise ApiError(
                404,
                f"The model {asked!r} does not exist; this server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )
