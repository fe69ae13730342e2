"""From logits to the next tokens; runs on the last stage only.

A token depends on its logits, its request's parameters, the tokens before it where these count
(penalties), and the random number of (seed, position): not on the batch it was computed in, nor on
how many stages there are.

Shapes: S rows to sample, V vocabulary, M tokens that may be chosen, most likely first.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch

from .penalties import TokenCounts, adjust
from .step import Sample, SamplingParams, StepRow

_FIRST_TRY = 256
"""Most likely tokens that are sorted before the whole vocabulary is, to find the top-p set."""


class Sampler:
    """Chooses tokens, and counts those of requests whose parameters ask for it."""

    def __init__(self) -> None:
        self._counts: dict[int, TokenCounts] = {}

    def forget(self, request_ids: Iterable[int]) -> None:
        """Drop what is known of requests; unknown ones are ignored."""
        for request_id in request_ids:
            self._counts.pop(request_id, None)

    def sample(self, logits_SV: torch.Tensor, rows: Sequence[StepRow]) -> tuple[Sample, ...]:
        """The token that follows each row, in the order of `rows`; each must have `sampling`.

        Log-probabilities are those of the model itself, before bias, penalties, temperature,
        min-p, top-k and top-p. A row whose logits are not finite gets a sample that says so.

        Raises:
            ValueError: a request counts tokens and its history never came.
        """
        if not rows:
            return ()
        logits_SV = logits_SV.float().cpu()
        # NaN where there is any, and the lowest of equally good ids, as torch's; in a tenth of the
        # time.
        best_S1 = torch.from_numpy(logits_SV.numpy().argmax(axis=-1, keepdims=True))
        values = logits_SV.gather(1, best_S1).flatten().tolist()
        samples = []
        for logits_V, value, token_id, row in zip(
            logits_SV, values, best_S1.flatten().tolist(), rows, strict=True
        ):
            if not -float("inf") < value < float("inf"):
                samples.append(Sample(request_id=row.request_id, token_id=0, is_finite=False))
                continue
            assert row.sampling is not None
            adjusted_V = logits_V
            if (
                row.sampling.counts_tokens
                or row.sampling.logit_bias
                or row.banned_ids
                or row.allowed
            ):
                adjusted_V = adjust(
                    logits_V,
                    row.sampling,
                    counts=self._count(row, len(logits_V)),
                    banned_ids=row.banned_ids,
                    allowed=row.allowed,
                )
                value, token_id = (x.item() for x in adjusted_V.max(dim=-1))
            if row.sampling.temperature > 0:
                position = row.position + len(row.token_ids)
                token_id = _draw(adjusted_V - value, row.sampling, position)
            samples.append(_report(logits_V, int(token_id), row))
        return tuple(samples)

    def _count(self, row: StepRow, vocab_size: int) -> TokenCounts | None:
        """The row's tokens counted in; None where nothing is to be counted."""
        assert row.sampling is not None
        if not row.sampling.counts_tokens:
            return None
        if row.history is not None:
            self._counts[row.request_id] = TokenCounts(row.history, vocab_size)
        elif row.request_id in self._counts:
            self._counts[row.request_id].add(row.token_ids)
        else:
            raise ValueError(f"request {row.request_id} counts tokens and brought no history")
        return self._counts[row.request_id]


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of one token: a hash, so that no state is carried along."""
    key = f"{seed}:{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53


def candidates(
    scaled_V: torch.Tensor, *, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [M] that may be chosen, most likely first, and their probabilities (not normalised).

    `scaled_V` are fp32 logits over the temperature, 0 the highest. First the `top_k` most likely
    remain (0: all), then the fewest of those whose probabilities, normalised over them, reach
    `top_p`; at least one always does. Equal logits rank by id.
    """
    num_kept = min(top_k, len(scaled_V)) if top_k > 0 else len(scaled_V)
    if top_p >= 1:
        ids_M = _largest(scaled_V, num_kept)
        return ids_M, scaled_V[ids_M].double().exp()
    total = float(_largest_values(scaled_V, num_kept).double().exp().sum())
    for count in (min(_FIRST_TRY, num_kept), num_kept):
        ids_M = _largest(scaled_V, count)
        weights_M = scaled_V[ids_M].double().exp()
        num_in_p = 1 + int((weights_M.cumsum(0)[:-1] < top_p * total).sum())
        if num_in_p < count:
            break
    return ids_M[:num_in_p], weights_M[:num_in_p]


def _draw(shifted_V: torch.Tensor, params: SamplingParams, position: int) -> int:
    """One token at a temperature above 0 by inversion of the cumulative distribution."""
    scaled_V = shifted_V / params.temperature
    if params.min_p > 0:
        # The likeliest stands at 0, so that this is the share of its probability.
        scaled_V = scaled_V.masked_fill(scaled_V < math.log(params.min_p), -float("inf"))
    if params.top_k <= 0 and params.top_p >= 1:
        ids_M, weights_M = None, scaled_V.double().exp()
    else:
        ids_M, weights_M = candidates(scaled_V, top_k=params.top_k, top_p=params.top_p)
    cumulative_M = weights_M.cumsum(0)
    target = cumulative_M[-1:] * uniform(params.seed, position)
    index = int(torch.searchsorted(cumulative_M, target, right=True))
    # Rounding can put the target on the total itself; the last token of any weight is meant.
    index = min(index, int(weights_M.nonzero()[-1]))
    return index if ids_M is None else int(ids_M[index])


def _largest_values(scaled_V: torch.Tensor, count: int) -> torch.Tensor:
    return scaled_V if count == len(scaled_V) else scaled_V.topk(count).values


def _largest(scaled_V: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest, descending; equal ones by id, which topk does not promise."""
    if count == len(scaled_V):
        return scaled_V.sort(descending=True, stable=True).indices
    threshold = scaled_V.topk(count).values[-1]
    ids = (scaled_V >= threshold).nonzero().squeeze(1)
    return ids[scaled_V[ids].sort(descending=True, stable=True).indices[:count]]


def _report(logits_V: torch.Tensor, token_id: int, row: StepRow) -> Sample:
    assert row.sampling is not None
    num_logprobs = row.sampling.num_logprobs
    if num_logprobs is None:
        return Sample(request_id=row.request_id, token_id=token_id)
    logprobs_V = logits_V.log_softmax(dim=-1)
    top_logprobs: tuple[tuple[int, float], ...] = ()
    if num_logprobs > 0:
        ids = _largest(logprobs_V, min(num_logprobs, len(logprobs_V)))
        top_logprobs = tuple(zip(ids.tolist(), logprobs_V[ids].tolist(), strict=True))
    return Sample(
        request_id=row.request_id,
        token_id=token_id,
        logprob=float(logprobs_V[token_id]),
        top_logprobs=top_logprobs,
    )
