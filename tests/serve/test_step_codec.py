"""Steps survive the wire to the bit; what is no step is refused."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.engine.step import (
    Sample,
    SamplingParams,
    ScoredToken,
    Scoring,
    StepPlan,
    StepResult,
    StepRow,
    TokenHistory,
)
from magnetar.serve.engine.step_codec import (
    Known,
    decode_error,
    decode_plan,
    decode_result,
    decode_traffic,
    encode_error,
    encode_plan,
    encode_result,
    encode_traffic,
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
pairs = st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=3).map(tuple)
sampling = st.builds(
    SamplingParams,
    temperature=numbers,
    top_p=numbers,
    top_k=st.integers(0, 10**6),
    seed=st.integers(0, 2**64 - 1),
    num_logprobs=st.none() | st.integers(0, 20),
    min_p=numbers,
    repetition_penalty=numbers,
    presence_penalty=numbers,
    frequency_penalty=numbers,
    logit_bias=pairs,
)
rows = st.builds(
    StepRow,
    request_id=st.integers(0, 2**40),
    position=st.integers(0, 10**6),
    token_ids=ids,
    new_block_ids=ids,
    sampling=st.none() | sampling,
    history=st.none() | st.builds(TokenHistory, prompt_ids=ids, answer_ids=ids),
    banned_ids=ids,
    scoring=st.none() | st.builds(Scoring, next_ids=ids, num_top=st.integers(0, 20)),
    pooling=st.sampled_from([None, "last", "mean"]),
    allowed=st.binary(max_size=9),
)
plans = st.builds(
    StepPlan, step_id=st.just(7), rows=st.lists(rows, max_size=4).map(tuple), released=ids
)
samples = st.builds(
    Sample,
    request_id=st.integers(0, 2**40),
    token_id=st.integers(0, 10**6),
    logprob=st.none() | numbers,
    top_logprobs=pairs,
    scored=st.lists(
        st.builds(
            ScoredToken,
            token_id=st.integers(0, 10**6),
            logprob=numbers,
            rank=st.integers(1, 10**6),
            top_logprobs=pairs,
        ),
        max_size=2,
    ).map(tuple),
    vector=st.lists(numbers, max_size=3).map(tuple),
    is_finite=st.booleans(),
)


@given(plans)
def test_plans_come_back_equal(plan: StepPlan) -> None:
    assert decode_plan(7, encode_plan(plan)) == plan


@given(st.lists(plans, max_size=6))
def test_a_link_carries_plans_that_lean_on_those_before(series: list[StepPlan]) -> None:
    ours: Known = {}
    theirs: Known = {}
    for plan in series:
        # The rows of one plan are of different requests.
        rows_by_id = {row.request_id: row for row in plan.rows}
        plan = replace(plan, rows=tuple(rows_by_id.values()))
        assert decode_plan(7, encode_plan(plan, ours), theirs) == plan
        assert ours == theirs


def test_how_a_request_samples_is_said_once_until_it_is_released() -> None:
    params = SamplingParams(temperature=0.5, logit_bias=((1, 2.0),) * 50)
    row = StepRow(request_id=1, position=0, token_ids=(1,), sampling=params)
    other = replace(row, request_id=2)
    known: Known = {}
    bodies = [
        encode_plan(StepPlan(step_id=7, rows=rows, released=released), known)
        for rows, released in [((row,), ()), ((row,), ()), ((row,), (1,)), ((row, other), ())]
    ]
    assert [len(body) > 100 for body in bodies] == [True, False, True, True]
    with pytest.raises(ValueError, match="'0' has no place"):
        decode_plan(7, bodies[1])


@given(st.lists(samples, max_size=4).map(tuple))
def test_results_come_back_equal(items: tuple[Sample, ...]) -> None:
    result = StepResult(step_id=7, samples=items)
    assert decode_result(7, encode_result(result)) == result


@given(st.text(max_size=50))
def test_errors_come_back_equal(message: str) -> None:
    assert decode_error(encode_error(message)) == message


def test_the_seeds_and_numbers_of_the_whole_range_survive() -> None:
    params = SamplingParams(temperature=5e-324, seed=2**64 - 1)
    row = StepRow(request_id=1, position=0, token_ids=(1,), sampling=params)
    plan = StepPlan(step_id=7, rows=(row,))
    assert decode_plan(7, encode_plan(plan)) == plan
    sample = Sample(request_id=1, token_id=1, logprob=-float("inf"))
    result = StepResult(step_id=7, samples=(sample,))
    assert decode_result(7, encode_result(result)) == result


@pytest.mark.parametrize("decode", [partial(decode_plan, 7), partial(decode_result, 7)])
@given(body=st.binary(max_size=60))
def test_bytes_that_are_no_step_are_refused(
    decode: Callable[[bytes], StepPlan | StepResult], body: bytes
) -> None:
    with contextlib.suppress(ValueError):
        decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"[[]]",
        b"[" * 50_000,
        b"[[],[1.0]]",
        b"[[],[true]]",
        b"[[],[-1]]",
        b'[[],["1"]]',
        b"[[[1,2,[3],[],null]],[]]",
        b"[[[1,2,[3],[],[0,1,0,0,NaN,0,1,0,0,[]],null]],[]]",
        b"[[[1,2,[3],[],[NaN,1,0,0,null,0,1,0,0,[]],null]],[]]",
        b"[[[1,2,[3],[],[0,1,0,0,null,0,1,0,0,[[1]]],null]],[]]",
        b'[[[1,2,[3],[],null,[null,[],null,"max",""]]],[]]',
        b'[[[1,2,[3],[],null,[null,[],null,[],""]]],[]]',
        b'[[[1,2,[3],[],null,[[[1]],[],null,null,""]]],[]]',
        b"[[[1,2,[3],[],null,[null,[],null,null,null]]],[]]",
        b'[[[1,2,[3],[],null,[null,[],null,null,"!"]]],[]]',
        b"[[],[],[]]",
    ],
)
def test_values_of_the_wrong_kind_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_plan(7, body)


@given(st.dictionaries(st.integers(0, 99), st.lists(st.integers(0), max_size=8).map(tuple)))
def test_the_traffic_of_experts_survives_the_link(tokens: dict[int, tuple[int, ...]]) -> None:
    assert decode_traffic(encode_traffic(tokens)) == tokens


@pytest.mark.parametrize("body", [b"{}", b"[[1]]", b"[[1,2]]", b"[[-1,[]]]", b"[[1,[-2]]]"])
def test_traffic_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any refusal will do
        decode_traffic(body)
