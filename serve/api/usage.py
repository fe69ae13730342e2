"""Counting tokens for a client, and numbers that JSON can hold."""

from dataclasses import dataclass

from ..engine.request import TokenEvent
from .protocol import GenerationBody

_LOWEST_LOGPROB = -9999.0


@dataclass(kw_only=True, slots=True)
class UsageCount:
    """The `usage` of an answer; several choices of one prompt count it once."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, those whose keys and values were there already."""

    def add(self, event: TokenEvent, *, choice: int) -> None:
        """Count a token of an answer; `choice` is its number among those to one prompt."""
        self.completion_tokens += 1
        if choice == 0:
            self.cached_tokens += event.num_cached_tokens

    @property
    def body(self) -> dict[str, object]:
        """As it is sent."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def chunk_usage(body: GenerationBody, usage: UsageCount) -> dict[str, object]:
    """The field that each chunk of a stream has of it, where one was asked for."""
    if body.usage_in_chunks:
        return {"usage": usage.body}
    return {"usage": None} if body.usage_at_end else {}


def finite(logprob: float | None) -> float | None:
    """`logprob`, or vLLM's -9999 for minus infinity, which JSON has no word for."""
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)
