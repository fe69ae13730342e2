"""What a request's parameters and its tokens so far change about its logits.

The definitions are those of OpenAI (presence, frequency) and of vLLM (repetition, order of all).

Shapes: V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .step import SamplingParams, TokenHistory


class TokenCounts:
    """How often each token is in one request's answer, and which are in its prompt or answer."""

    def __init__(self, history: TokenHistory, vocab_size: int) -> None:
        self._in_answer_V = torch.zeros(vocab_size, dtype=torch.float32)
        self._seen_V = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen_V[list(history.prompt_ids)] = True
        self.add(history.answer_ids)

    def add(self, token_ids: Sequence[int]) -> None:
        """Count more tokens of the answer."""
        ids = torch.tensor(token_ids, dtype=torch.int64)
        self._in_answer_V.index_add_(0, ids, torch.ones(len(ids)))
        self._seen_V[ids] = True

    def penalise(self, logits_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        """New fp32 logits [V] with the three penalties of `params`."""
        if params.repetition_penalty != 1:
            penalty = params.repetition_penalty
            penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
            logits_V = torch.where(self._seen_V, penalised_V, logits_V)
        if params.frequency_penalty != 0:
            logits_V = logits_V - params.frequency_penalty * self._in_answer_V
        if params.presence_penalty != 0:
            logits_V = logits_V - params.presence_penalty * (self._in_answer_V > 0)
        return logits_V


def adjust(
    logits_V: torch.Tensor,
    params: SamplingParams,
    *,
    counts: TokenCounts | None,
    banned_ids: Sequence[int] = (),
    allowed: bytes = b"",
) -> torch.Tensor:
    """Biased, then penalised logits [V], -inf where `StepRow` says so; `logits_V` stays as it is.

    Tokens beyond the model's vocabulary are ignored.
    """
    vocab_size = len(logits_V)
    if bias := [(token_id, by) for token_id, by in params.logit_bias if token_id < vocab_size]:
        ids, amounts = zip(*bias, strict=True)
        logits_V = logits_V.index_add(0, torch.tensor(ids), torch.tensor(amounts))
    if counts is not None:
        logits_V = counts.penalise(logits_V, params)
    if allowed:
        bits = np.unpackbits(np.frombuffer(allowed, np.uint8), count=vocab_size, bitorder="little")
        logits_V = logits_V.masked_fill(torch.from_numpy(bits) == 0, -float("inf"))
    if banned := [token_id for token_id in banned_ids if token_id < vocab_size]:
        rest_V = logits_V.index_fill(0, torch.tensor(banned), -float("inf"))
        if float(rest_V.max()) > -float("inf"):
            logits_V = rest_V
    return logits_V
