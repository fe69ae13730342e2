"""Steps survive the wire to the bit; what is no step is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from magnetar.errors import StageLostError
from magnetar.serve.step import Sample, SamplingParams, StepPlan, StepResult, StepRow
from magnetar.serve.step_codec import decode_plan, decode_result, encode_plan, encode_result

numbers = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
sampling = st.builds(
    SamplingParams,
    temperature=numbers,
    top_p=numbers,
    top_k=st.integers(0, 10**6),
    seed=st.integers(0, 2**64 - 1),
    num_logprobs=st.none() | st.integers(0, 20),
)
rows = st.builds(
    StepRow,
    request_id=st.integers(0, 2**40),
    position=st.integers(0, 10**6),
    token_ids=ids,
    new_block_ids=ids,
    sampling=st.none() | sampling,
)
plans = st.builds(
    StepPlan, step_id=st.just(7), rows=st.lists(rows, max_size=4).map(tuple), released=ids
)
samples = st.builds(
    Sample,
    request_id=st.integers(0, 2**40),
    token_id=st.integers(0, 10**6),
    logprob=st.none() | numbers,
    top_logprobs=st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=3).map(tuple),
)


@given(plans)
def test_plans_come_back_equal(plan: StepPlan) -> None:
    assert decode_plan(7, encode_plan(plan)) == plan


@given(st.lists(samples, max_size=4).map(tuple))
def test_results_come_back_equal(items: tuple[Sample, ...]) -> None:
    result = StepResult(step_id=7, samples=items)
    assert decode_result(7, encode_result(result)) == result


@given(st.binary(max_size=60) | st.sampled_from([b"[1,2]", b"[[[1,2,3,4]],[]]", b"[" * 5000]))
def test_bytes_that_are_no_step_are_refused(body: bytes) -> None:
    for decode in (decode_plan, decode_result):
        try:
            decode(7, body)
        except StageLostError as error:
            assert "step 7" in str(error)  # noqa: PT017 - most bytes are refused, a few are steps


def test_says_which_step_was_broken() -> None:
    with pytest.raises(StageLostError, match="step 3: the frame holds no plan"):
        decode_plan(3, b"{}")
