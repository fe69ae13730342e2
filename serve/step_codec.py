"""Steps and their results as bytes: compact JSON lists, strict on the way back."""

import json
from typing import Any

from ..errors import StageLostError
from .step import Sample, SamplingParams, StepPlan, StepResult, StepRow


def encode_plan(plan: StepPlan) -> bytes:
    """The plan without its step id, which the frame carries."""
    rows = [
        [row.request_id, row.position, row.token_ids, row.new_block_ids, _sampling(row.sampling)]
        for row in plan.rows
    ]
    return json.dumps([rows, plan.released], separators=(",", ":")).encode()


def decode_plan(step_id: int, body: bytes) -> StepPlan:
    """The inverse of `encode_plan`.

    Raises:
        StageLostError: the bytes are no plan; the peer is not what it says it is.
    """
    try:
        rows, released = json.loads(body)
        return StepPlan(
            step_id=step_id,
            rows=tuple(
                StepRow(
                    request_id=int(request_id),
                    position=int(position),
                    token_ids=tuple(map(int, token_ids)),
                    new_block_ids=tuple(map(int, new_block_ids)),
                    sampling=None if sampling is None else _decode_sampling(sampling),
                )
                for request_id, position, token_ids, new_block_ids, sampling in rows
            ),
            released=tuple(map(int, released)),
        )
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise StageLostError(f"step {step_id}: the frame holds no plan: {error}") from error


def encode_result(result: StepResult) -> bytes:
    """The samples; the frame carries the step id."""
    samples = [
        [sample.request_id, sample.token_id, sample.logprob, sample.top_logprobs]
        for sample in result.samples
    ]
    return json.dumps(samples, separators=(",", ":")).encode()


def decode_result(step_id: int, body: bytes) -> StepResult:
    """The inverse of `encode_result`; floats come back to the bit.

    Raises:
        StageLostError: the bytes are no result.
    """
    try:
        return StepResult(
            step_id=step_id,
            samples=tuple(
                Sample(
                    request_id=int(request_id),
                    token_id=int(token_id),
                    logprob=None if logprob is None else float(logprob),
                    top_logprobs=tuple((int(token), float(value)) for token, value in top),
                )
                for request_id, token_id, logprob, top in json.loads(body)
            ),
        )
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise StageLostError(f"step {step_id}: the frame holds no result: {error}") from error


def _sampling(params: SamplingParams | None) -> list[Any] | None:
    if params is None:
        return None
    return [params.temperature, params.top_p, params.top_k, params.seed, params.num_logprobs]


def _decode_sampling(values: list[Any]) -> SamplingParams:
    temperature, top_p, top_k, seed, num_logprobs = values
    return SamplingParams(
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=int(top_k),
        seed=int(seed),
        num_logprobs=None if num_logprobs is None else int(num_logprobs),
    )
