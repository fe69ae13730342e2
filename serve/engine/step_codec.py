"""Steps and what comes of them as bytes: compact JSON lists, strict on the way back.

The step id is not part of it: frames carry it.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from .step import (
    Sample,
    SamplingParams,
    ScoredToken,
    Scoring,
    StepPlan,
    StepResult,
    StepRow,
    TokenHistory,
)

MAX_ERROR_CHARS = 2000


Known = dict[int, SamplingParams]
"""How each request samples, for the two ends of a link that carries steps in order: it is said once
and not with every token. Both ends update theirs with every step, and forget what is released."""


def encode_plan(plan: StepPlan, known: Known | None = None) -> bytes:
    """The rows and the released requests; without `known`, a message that stands alone."""
    known = {} if known is None else known
    for request_id in plan.released:
        known.pop(request_id, None)
    rows = [
        [
            row.request_id,
            row.position,
            row.token_ids,
            row.new_block_ids,
            _sampling(row, known),
            _extras(row),
        ]
        for row in plan.rows
    ]
    return _dump([rows, plan.released])


def decode_plan(step_id: int, body: bytes, known: Known | None = None) -> StepPlan:
    """The inverse of `encode_plan`; ValueError for anything else."""
    known = {} if known is None else known
    values, released = _list(_load(body), 2)
    released = _counts(released)
    for request_id in released:
        known.pop(request_id, None)
    rows = tuple([_row(value, known) for value in _list(values)])
    return StepPlan(step_id=step_id, rows=rows, released=released)


def encode_result(result: StepResult) -> bytes:
    """The samples; most are only a token."""
    return _dump(
        [[sample.request_id, sample.token_id, *_sample_extras(sample)] for sample in result.samples]
    )


def decode_result(step_id: int, body: bytes) -> StepResult:
    """The inverse of `encode_result`, floats to the bit; ValueError for anything else."""
    return StepResult(step_id=step_id, samples=tuple(map(_sample, _list(_load(body)))))


def encode_traffic(expert_tokens: Mapping[int, Sequence[int]]) -> bytes:
    """By layer, the tokens that each expert was chosen for."""
    return _dump([[layer, counts] for layer, counts in expert_tokens.items()])


def decode_traffic(body: bytes) -> dict[int, tuple[int, ...]]:
    """The inverse of `encode_traffic`; ValueError for anything else."""
    pairs = [_list(pair, 2) for pair in _list(_load(body))]
    return {_count(layer): _counts(counts) for layer, counts in pairs}


def encode_error(message: str) -> bytes:
    """What ended a stage, for the engine's callers."""
    return _dump(message[:MAX_ERROR_CHARS])


def decode_error(body: bytes) -> str:
    """The inverse of `encode_error`; ValueError for anything else."""
    message = _load(body)
    return message if isinstance(message, str) else _refuse(message)


_AS_BEFORE = 0
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder()


def _sampling(row: StepRow, known: Known) -> list[Any] | int | None:
    params = row.sampling
    if params is None:
        return None
    if known.get(row.request_id) is params:
        return _AS_BEFORE
    known[row.request_id] = params
    return [
        params.temperature,
        params.top_p,
        params.top_k,
        params.seed,
        params.num_logprobs,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.logit_bias,
    ]


def _extras(row: StepRow) -> list[Any] | None:
    """What few rows have."""
    history, scoring = row.history, row.scoring
    if (
        history is None
        and scoring is None
        and row.pooling is None
        and not row.banned_ids
        and not row.allowed
    ):
        return None
    return [
        None if history is None else [history.prompt_ids, history.answer_ids],
        row.banned_ids,
        None if scoring is None else [scoring.next_ids, scoring.num_top],
        row.pooling,
        base64.b64encode(row.allowed).decode(),
    ]


def _row(value: Any, known: Known) -> StepRow:
    request_id, position, token_ids, new_block_ids, sampling, extras = _list(value, 6)
    request_id = _count(request_id)
    params = None
    if sampling is not None:
        params = known.get(request_id) if sampling == _AS_BEFORE else _sampling_params(sampling)
        if params is None:
            _refuse(sampling)
        known[request_id] = params
    row = StepRow(
        request_id=request_id,
        position=_count(position),
        token_ids=_counts(token_ids),
        new_block_ids=_counts(new_block_ids),
        sampling=params,
    )
    return row if extras is None else _with_extras(row, extras)


def _with_extras(row: StepRow, value: Any) -> StepRow:
    history, banned_ids, scoring, pooling, allowed = _list(value, 5)
    if pooling not in (None, "last", "mean"):
        _refuse(pooling)
    if not isinstance(allowed, str):
        _refuse(allowed)
    return replace(
        row,
        history=None if history is None else _history(history),
        banned_ids=_counts(banned_ids),
        scoring=None if scoring is None else _scoring(scoring),
        pooling=pooling,
        allowed=base64.b64decode(allowed, validate=True),
    )


def _history(value: Any) -> TokenHistory:
    prompt_ids, answer_ids = _list(value, 2)
    return TokenHistory(prompt_ids=_counts(prompt_ids), answer_ids=_counts(answer_ids))


def _scoring(value: Any) -> Scoring:
    next_ids, num_top = _list(value, 2)
    return Scoring(next_ids=_counts(next_ids), num_top=_count(num_top))


def _sampling_params(value: Any) -> SamplingParams:
    (
        temperature,
        top_p,
        top_k,
        seed,
        num_logprobs,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
    ) = _list(value, 10)
    return SamplingParams(
        temperature=_number(temperature),
        top_p=_number(top_p),
        top_k=_count(top_k),
        seed=_count(seed),
        num_logprobs=None if num_logprobs is None else _count(num_logprobs),
        min_p=_number(min_p),
        repetition_penalty=_number(repetition_penalty),
        presence_penalty=_number(presence_penalty),
        frequency_penalty=_number(frequency_penalty),
        logit_bias=_pairs(logit_bias),
    )


def _sample_extras(sample: Sample) -> list[Any]:
    """What few samples have."""
    if (
        sample.logprob is None
        and not sample.top_logprobs
        and not sample.scored
        and not sample.vector
        and sample.is_finite
    ):
        return []
    return [
        sample.logprob,
        sample.top_logprobs,
        [[s.token_id, s.logprob, s.rank, s.top_logprobs] for s in sample.scored],
        sample.vector,
        int(sample.is_finite),
    ]


def _sample(value: Any) -> Sample:
    if len(_list(value)) == 2:
        request_id, token_id = value
        return Sample(request_id=_count(request_id), token_id=_count(token_id))
    request_id, token_id, logprob, top_logprobs, scored, vector, is_finite = _list(value, 7)
    if is_finite not in (0, 1):
        _refuse(is_finite)
    return Sample(
        request_id=_count(request_id),
        token_id=_count(token_id),
        logprob=None if logprob is None else _number(logprob),
        top_logprobs=_pairs(top_logprobs),
        scored=tuple(map(_scored_token, _list(scored))),
        vector=tuple(map(_number, _list(vector))),
        is_finite=bool(is_finite),
    )


def _scored_token(value: Any) -> ScoredToken:
    token_id, logprob, rank, top_logprobs = _list(value, 4)
    return ScoredToken(
        token_id=_count(token_id),
        logprob=_number(logprob),
        rank=_count(rank),
        top_logprobs=_pairs(top_logprobs),
    )


def _pairs(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = [_list(pair, 2) for pair in _list(value)]
    return tuple((_count(token_id), _number(number)) for token_id, number in pairs)


def _dump(value: Any) -> bytes:
    return _ENCODER.encode(value).encode()


def _load(body: bytes) -> Any:
    text = body.decode()
    try:
        value, end = _DECODER.raw_decode(text)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    return value if end == len(text) else _refuse(text[end:])


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        _refuse(value)
    return value


def _counts(value: Any) -> tuple[int, ...]:
    items = tuple(_list(value))
    # Set and min run in C: a chunk of a prompt has hundreds.
    if items and (set(map(type, items)) != {int} or min(items) < 0):
        _refuse(value)
    return items


def _count(value: Any) -> int:
    # A bool is an int to Python.
    return value if type(value) is int and value >= 0 else _refuse(value)


def _number(value: Any) -> float:
    # Whole numbers come as int; a token that cannot be has a log-probability of -inf.
    if type(value) not in (int, float) or math.isnan(value):
        _refuse(value)
    return float(value)


def _refuse(value: Any) -> NoReturn:
    raise ValueError(f"{str(value)[:40]!r} has no place in the message")
