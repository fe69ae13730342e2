"""The one message of the pipeline: what a step computes, and what comes out of it.

The engine decides everything; stages execute. A stage remembers nothing about a request but its
KV block table, which it builds from `StepRow.new_block_ids`; the last stage also what it has read
of the request so far (`Readout`), until the request is released.

Rows and samples are values like the others, but not frozen: a step has 64 of them and a tenth of a
millisecond, and freezing made one three times as dear (1.2 µs against 0.4).
"""

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["last", "mean"]
"""How the hidden states of a prompt become one vector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose the next token from its logits."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    """The random number of a token depends on this and the token's position alone."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in the prompt or the answer, multiplies the others."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token in the answer."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it is in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""
    num_logprobs: int | None = None
    """None: no logprobs; k: the sampled token's and the k most likely ones'."""

    @property
    def counts_tokens(self) -> bool:
        """Whether the tokens before matter to the choice of the next."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenHistory:
    """All tokens of a request up to the end of a row."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """Which tokens of the prompt to give log-probabilities for."""

    next_ids: tuple[int, ...]
    """What follows the row's first tokens in the prompt, one each."""
    num_top: int
    """Most likely tokens that are told beside."""


@dataclass(kw_only=True, slots=True)
class StepRow:
    """Consecutive tokens of one request."""

    request_id: int
    position: int
    """Position of the first token; everything before it is in the KV cache."""
    token_ids: tuple[int, ...]
    new_block_ids: tuple[int, ...] = ()
    """KV blocks appended to the request's table before this row is computed."""
    sampling: SamplingParams | None = None
    """Set when the row ends at the request's last known token: sample the next one."""
    history: TokenHistory | None = None
    """For a request that `counts_tokens`, on its first sampled row since it was admitted: prompts
    may be computed in chunks, again, or not at all. Later rows bring one more of the answer."""
    banned_ids: tuple[int, ...] = ()
    """Tokens that must not be sampled: those that would end the answer too early. They may all the
    same where nothing else is left."""
    allowed: bytes = b""
    """A bit for each token, lowest first, 1 where a grammar lets it follow, and tokens beyond its
    end may not; empty allows all."""
    scoring: Scoring | None = None
    """The results are kept on the last stage and come with the request's next sample."""
    pooling: Pooling | None = None
    """Pool the row's hidden states with those before; the vector comes with the next sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One pass through all stages."""

    step_id: int
    rows: tuple[StepRow, ...]
    released: tuple[int, ...] = ()
    """Requests whose block tables are forgotten before the rows are computed."""

    @property
    def num_tokens(self) -> int:
        """Rows of the hidden state, in the order of `rows`."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredToken:
    """How likely a token of the prompt was after those before it."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely; equally likely tokens share the better rank."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Token ids and their log-probabilities, most likely first."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """The token that follows a row."""

    request_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    scored: tuple[ScoredToken, ...] = ()
    """The tokens of the prompt from the second on, where `Scoring` asked for them."""
    vector: tuple[float, ...] = ()
    """The pooled hidden states after the final norm, of length 1; empty without `pooling`."""
    is_finite: bool = True
    """False: the request's numbers overflowed, and the token means nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What the last stage sends back: samples and what was asked of them, never logits."""

    step_id: int
    samples: tuple[Sample, ...]
