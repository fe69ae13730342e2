"""Choosing tokens: exact sets, the right distribution, and the same token every time."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import MagnetarError
from magnetar.serve.engine.sampler import candidates, sample, uniform
from magnetar.serve.engine.step import Sample, SamplingParams, StepRow

NUM_DRAWS = 20_000
LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, 1.0])


def row_of(params: SamplingParams, *, position: int = 0, request_id: int = 0) -> StepRow:
    return StepRow(request_id=request_id, position=position, token_ids=(1,), sampling=params)


def draws(params: SamplingParams, logits: torch.Tensor = LOGITS) -> list[Sample]:
    rows = [row_of(params, position=position) for position in range(NUM_DRAWS)]
    return list(sample(logits.expand(NUM_DRAWS, -1), rows))


def kept_by_definition(logits: list[float], top_k: int, top_p: float) -> list[int]:
    """Sort by logit and id, cut to k, then to the fewest whose normalised sum reaches p."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[: top_k or None]
    weights = [math.exp(logits[i] - max(logits)) for i in ranked]
    kept: list[int] = []
    for i in range(len(ranked)):
        if i and sum(weights[:i]) >= top_p * sum(weights):
            break
        kept.append(ranked[i])
    return kept


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(seed=1), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(temperature=0.5, seed=2), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(top_k=3, seed=3), [1, 3, 5]),
        (SamplingParams(top_p=0.6, seed=4), [1, 3]),
        (SamplingParams(top_k=4, top_p=0.9, temperature=2.0, seed=5), [0, 1, 3, 5]),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, allowed: list[int]) -> None:
    counts = Counter(drawn.token_id for drawn in draws(params))
    assert set(counts) <= set(allowed)
    probabilities = (LOGITS / params.temperature)[allowed].softmax(0).tolist()
    chi_square = sum(
        (counts[token] - NUM_DRAWS * p) ** 2 / (NUM_DRAWS * p)
        for token, p in zip(allowed, probabilities, strict=True)
    )
    # The 99.9 % quantiles of chi-square by degrees of freedom.
    quantile = {1: 10.8, 2: 13.8, 3: 16.3, 5: 20.5}[len(allowed) - 1]
    assert chi_square < quantile


@given(
    logits=st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=1, max_size=400),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 0.999),
)
def test_kept_tokens_are_exactly_those_of_the_definition(
    logits: list[float], top_k: int, top_p: float
) -> None:
    scaled = torch.tensor(logits)
    ids, weights = candidates(scaled - scaled.max(), top_k=top_k, top_p=top_p)
    expected = kept_by_definition(logits, top_k, top_p)
    # A sum that meets p to the last bit may round either way.
    if len(ids) != len(expected):
        total = sum(math.exp(x - max(logits)) for x in sorted(logits)[-top_k or None :])
        short = sum(weights.tolist()[: min(len(ids), len(expected))])
        assert short == pytest.approx(top_p * total, rel=1e-6)
    common = min(len(ids), len(expected))
    assert ids.tolist()[:common] == expected[:common]


def test_top_p_beyond_the_first_try_takes_the_whole_vocabulary_in() -> None:
    ids, _ = candidates(torch.zeros(5000), top_k=0, top_p=0.5)
    assert ids.tolist() == list(range(2500))


@pytest.mark.parametrize("params", [SamplingParams(top_p=1e-9), SamplingParams(top_k=1)])
def test_the_strictest_limits_keep_the_best_token(params: SamplingParams) -> None:
    (drawn,) = sample(LOGITS.unsqueeze(0), [row_of(params)])
    assert drawn.token_id == 1


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    params = SamplingParams(temperature=0.0)
    assert [s.token_id for s in sample(logits, [row_of(params), row_of(params)])] == [1, 0]


def test_a_tiny_temperature_is_greedy() -> None:
    (drawn,) = sample(LOGITS.unsqueeze(0), [row_of(SamplingParams(temperature=1e-30))])
    assert drawn.token_id == 1


def test_a_draw_does_not_depend_on_its_place_in_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 300)
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40 * (i % 2), seed=i) for i in range(7)
    ]
    rows = [row_of(params[i], position=10 * i, request_id=i) for i in range(7)]
    together = sample(logits, rows)
    backwards = sample(logits.flip(0), rows[::-1])
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(7)]
    assert list(together) == list(backwards)[::-1] == alone


def test_the_random_number_depends_on_seed_and_position_of_the_sampled_token() -> None:
    long = StepRow(request_id=0, position=5, token_ids=(1, 2, 3), sampling=SamplingParams(seed=9))
    short = row_of(SamplingParams(seed=9), position=7)
    flat = torch.zeros(1, 10_000)
    assert sample(flat, [long])[0].token_id == sample(flat, [short])[0].token_id
    assert uniform(9, 8) != uniform(9, 9) != uniform(10, 9)
    assert 0 <= uniform(-(2**70), 0) < 1


def test_logprobs_are_the_models_own_before_any_limit() -> None:
    params = SamplingParams(temperature=0.3, top_k=2, num_logprobs=3)
    (drawn,) = sample(LOGITS.unsqueeze(0), [row_of(params)])
    expected = LOGITS.log_softmax(0)
    assert drawn.logprob == pytest.approx(float(expected[drawn.token_id]))
    assert [token for token, _ in drawn.top_logprobs] == [1, 3, 5]
    assert [value for _, value in drawn.top_logprobs] == pytest.approx(expected[[1, 3, 5]].tolist())


def test_logprobs_of_the_sampled_token_alone() -> None:
    (drawn,) = sample(LOGITS.unsqueeze(0), [row_of(SamplingParams(temperature=0, num_logprobs=0))])
    assert drawn.logprob is not None
    assert drawn.top_logprobs == ()


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    (drawn,) = sample(LOGITS.unsqueeze(0), [row_of(SamplingParams(temperature=0, num_logprobs=99))])
    assert len(drawn.top_logprobs) == len(LOGITS)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_overflowed_are_an_error(bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0]])
    with pytest.raises(MagnetarError, match="not finite"):
        sample(logits, [row_of(SamplingParams(temperature=0))])


def test_no_rows_give_no_samples() -> None:
    assert sample(torch.empty(0, 8), []) == ()
