"""Counting tokens for a client, and numbers that JSON can hold."""

from dataclasses import dataclass

_LOWEST_LOGPROB = -9999.0


@dataclass(kw_only=True, slots=True)
class UsageCount:
    """The `usage` of an answer; several choices of one prompt count it once."""

    prompt_tokens: int
    completion_tokens: int = 0

    @property
    def body(self) -> dict[str, int]:
        """As it is sent."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def finite(logprob: float | None) -> float | None:
    """`logprob`, or vLLM's -9999 for minus infinity, which JSON has no word for."""
    return None if logprob is None else max(logprob, _LOWEST_LOGPROB)
