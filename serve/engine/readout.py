"""The end of the last stage: from hidden states to what a step's requests asked for.

Shapes: T tokens of the step, N tokens of one row, S tokens whose successor is sampled, C model
width, V vocabulary, K most likely tokens.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from ..model.norm import rms_norm
from ..model.transformer import Transformer
from .sampler import Sampler
from .step import Sample, ScoredToken, Scoring, StepPlan, StepRow

_SCORED_AT_ONCE = 64
"""Rows of logits in memory at once while a prompt is scored."""


class Readout:
    """Samples, scores prompts and pools hidden states; keeps what chunks of a prompt brought.

    What it keeps of a request does not depend on the batch; it is forgotten when the request is
    released, and comes anew when a preempted one is computed again.
    """

    def __init__(self, transformer: Transformer) -> None:
        """`transformer` must have the output head."""
        self._transformer = transformer
        self._sampler = Sampler()
        self._scored: dict[int, list[ScoredToken]] = {}
        self._overflowed: set[int] = set()
        """Requests whose prompts met numbers that are not finite."""
        self._pooled: dict[int, torch.Tensor] = {}

    def logits(self, plan: StepPlan, hidden_TC: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of the rows that are sampled from."""
        ends, num_tokens = [], 0
        for row in plan.rows:
            num_tokens += len(row.token_ids)
            if row.sampling is not None:
                ends.append(num_tokens - 1)
        ends_S = torch.tensor(ends, dtype=torch.int64, device=hidden_TC.device)
        return self._transformer.logits(hidden_TC.index_select(0, ends_S))

    def read(self, plan: StepPlan, hidden_TC: torch.Tensor) -> tuple[Sample, ...]:
        """The samples of a step, with the scores and vectors of prompts that are now whole.

        Where the numbers of a request are not finite, its sample says so.
        """
        self._overflowed.difference_update(plan.released)
        for request_id in plan.released:
            self._scored.pop(request_id, None)
            self._pooled.pop(request_id, None)
        self._sampler.forget(plan.released)
        start = 0
        for row in plan.rows:
            hidden_NC = hidden_TC[start : start + len(row.token_ids)]
            start += len(row.token_ids)
            if row.scoring is not None:
                self._scored.setdefault(row.request_id, []).extend(self._score(hidden_NC, row))
            if row.pooling is not None:
                self._pool(hidden_NC, row)
        rows = [row for row in plan.rows if row.sampling is not None]
        samples = self._sampler.sample(self.logits(plan, hidden_TC), rows)
        return tuple(map(self._complete, samples))

    def _score(self, hidden_NC: torch.Tensor, row: StepRow) -> list[ScoredToken]:
        """How likely each token of the prompt was that follows one of the row's."""
        assert row.scoring is not None
        scored: list[ScoredToken] = []
        for start in range(0, len(row.scoring.next_ids), _SCORED_AT_ONCE):
            next_ids = row.scoring.next_ids[start : start + _SCORED_AT_ONCE]
            logits = self._transformer.logits(hidden_NC[start : start + len(next_ids)])
            if not bool(logits.isfinite().all()):
                self._overflowed.add(row.request_id)
                break
            scored += _scored_tokens(
                logits.float().cpu().log_softmax(dim=-1), next_ids, row.scoring
            )
        return scored

    def _pool(self, hidden_NC: torch.Tensor, row: StepRow) -> None:
        """The last state so far, or the sum: of length 1 it is the mean of length 1."""
        norm, eps = self._transformer.norm, self._transformer.config.norm_eps
        assert norm is not None
        if row.pooling == "last":
            self._pooled[row.request_id] = rms_norm(hidden_NC[-1:], norm, eps)[0].float().cpu()
            return
        # One after the other, so that it does not matter which tokens come in one chunk.
        normed_NC = rms_norm(hidden_NC, norm, eps).cpu().double()
        if row.request_id in self._pooled:
            normed_NC = torch.cat([self._pooled[row.request_id].unsqueeze(0), normed_NC])
        self._pooled[row.request_id] = normed_NC.cumsum(dim=0)[-1]

    def _complete(self, sample: Sample) -> Sample:
        scored = self._scored.pop(sample.request_id, None)
        pooled_C = self._pooled.pop(sample.request_id, None)
        if pooled_C is not None and not bool(pooled_C.isfinite().all()):
            self._overflowed.add(sample.request_id)
        if sample.request_id in self._overflowed:
            return Sample(request_id=sample.request_id, token_id=0, is_finite=False)
        if scored is not None:
            sample = replace(sample, scored=tuple(scored))
        if pooled_C is not None:
            sample = replace(sample, vector=tuple(F.normalize(pooled_C.float(), dim=0).tolist()))
        return sample


def _scored_tokens(
    logprobs_NV: torch.Tensor, next_ids: tuple[int, ...], scoring: Scoring
) -> list[ScoredToken]:
    next_N1 = torch.tensor(next_ids, dtype=torch.int64).unsqueeze(1)
    own_N1 = logprobs_NV.gather(1, next_N1)
    ranks = ((logprobs_NV > own_N1).sum(dim=1) + 1).tolist()
    top_NK = logprobs_NV.topk(min(scoring.num_top, logprobs_NV.shape[1]), dim=1)
    return [
        ScoredToken(
            token_id=token_id,
            logprob=logprob,
            rank=rank,
            top_logprobs=tuple(zip(top_ids, tops, strict=True)),
        )
        for token_id, logprob, rank, top_ids, tops in zip(
            next_ids,
            own_N1.squeeze(1).tolist(),
            ranks,
            top_NK.indices.tolist(),
            top_NK.values.tolist(),
            strict=True,
        )
    ]
