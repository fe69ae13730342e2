"""Steps with prompts and without: both kinds of steps bring what is generated and its prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.footprint import STEP_TOKENS
from magnetar.cluster.search.mix import PROMPT_TOKENS, mean, mix, sizes


@given(tokens=st.integers(1, 2000))
def test_a_step_has_room_for_three_times_the_prompts_or_is_large(tokens: int) -> None:
    large, *small = sizes(tokens)
    assert large == STEP_TOKENS
    for size in small:
        assert 4 * tokens <= size < large


@given(tokens=st.integers(1, 300), number=st.sampled_from((0, -1)))
def test_steps_of_a_mix_bring_a_token_of_prompts_for_every_one_decoded(
    tokens: int, number: int
) -> None:
    steps = mix(tokens, sizes(tokens)[number])
    carried = sum(share * count for share, count in steps)
    steps_each = sum(share for share, _ in steps)
    assert steps_each >= 1 - 1e-9
    if steps_each == pytest.approx(1):
        assert carried == pytest.approx((1 + PROMPT_TOKENS) * tokens)


def test_the_better_of_two_mixes_counts_element_by_element() -> None:
    few, many = ((0.5, 1), (0.5, 9)), ((1.0, 4),)
    found = mean((few, many), lambda n: np.array([n, 10.0 - n]))
    assert found.tolist() == [4.0, 5.0]
    assert mean((few,), float) == 5.0
