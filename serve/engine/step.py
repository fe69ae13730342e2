"""The one message of the pipeline: what a step computes, and what comes out of it.

The engine decides everything; stages execute. A stage remembers nothing about a request but its
KV block table, which it builds from `StepRow.new_block_ids`.
"""

from dataclasses import dataclass


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
    num_logprobs: int | None = None
    """None: no logprobs; k: the sampled token's and the k most likely ones'."""


@dataclass(frozen=True, kw_only=True, slots=True)
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
class Sample:
    """The token that follows a row."""

    request_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What the last stage sends back: samples only, never logits."""

    step_id: int
    samples: tuple[Sample, ...]
