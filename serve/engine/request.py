"""What is asked of the engine, what comes back, and the state of a request in between."""

from dataclasses import dataclass, field
from typing import Literal

from .step import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationParams:
    """How to continue a prompt, and when to stop."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer besides the model's own; the ending token is still reported."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-text tokens, not past `stop_token_ids`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One generated token; the last of a request has a finish reason."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Token ids and their log-probabilities, most likely first."""
    finish_reason: FinishReason | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One prompt and its answer so far. Only the scheduler changes it."""

    request_id: int
    """Ascending in order of arrival; never used twice."""
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    token_ids: list[int] = field(init=False)
    """The prompt and the answer so far."""
    block_ids: list[int] = field(default_factory=list)
    """KV blocks it holds, in the order of its positions."""
    num_blocks_sent: int = 0
    """Leading `block_ids` that the stages know of."""
    num_scheduled: int = 0
    """Leading tokens whose keys and values are computed or on their way through the stages."""
    awaits_sample: bool = False
    """A step in flight will bring its next token."""
    last_step_id: int = -1
    """The last step it took part in."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def num_unscheduled(self) -> int:
        """Known tokens that no step computes yet; 0 while the next token is awaited."""
        return len(self.token_ids) - self.num_scheduled

    @property
    def decodes(self) -> bool:
        """Whether all its known tokens but the last are scheduled."""
        return self.num_scheduled > 0 and self.num_unscheduled <= 1

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - len(self.prompt_ids)
