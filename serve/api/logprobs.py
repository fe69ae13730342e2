"""Log-probabilities in the shapes that clients read."""

from collections.abc import Sequence
from typing import Any

from ..engine.request import TokenEvent
from ..engine.step import ScoredToken
from ..text.detokenizer import Detokenizer
from .served_model import ServedModel
from .usage import finite


def by_name(
    model: ServedModel, token: TokenEvent | ScoredToken, num_top: int
) -> dict[str, float | None]:
    """The token itself and the `num_top` most likely ones by name.

    Where two share a name the token itself stays, then the more likely one. lm-eval calls a token
    greedy when it has the highest of these floats.
    """
    name = model.tokenizer.token_name
    top = {name(token.token_id): finite(token.logprob)}
    for token_id, logprob in token.top_logprobs[:num_top]:
        top.setdefault(name(token_id), finite(logprob))
    return top


def by_token_id(
    model: ServedModel, scored: Sequence[ScoredToken], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: None for the first token, then dicts by token id."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        name = model.tokenizer.token_name(token_id)
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": name}

    listed: list[dict[str, Any] | None] = [None]
    for token in scored:
        own = {str(token.token_id): entry(token.token_id, token.logprob, token.rank)}
        for rank, (token_id, logprob) in enumerate(token.top_logprobs[:num_top], start=1):
            own.setdefault(str(token_id), entry(token_id, logprob, rank))
        listed.append(own)
    return listed


def offsets(model: ServedModel, prompt_ids: Sequence[int]) -> list[int]:
    """Where each token of a prompt begins in its text."""
    detokenizer = Detokenizer(model.tokenizer, at_start=True)
    starts, num_chars = [], 0
    for token_id in prompt_ids:
        starts.append(num_chars)
        num_chars += len(detokenizer.feed(token_id))
    return starts
