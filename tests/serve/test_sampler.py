"""Choosing tokens: exact sets, the right distribution, and the same token every time."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.engine.sampler import Sampler, candidates, uniform
from magnetar.serve.engine.step import Sample, SamplingParams, StepRow, TokenHistory

NUM_DRAWS = 20_000
LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, 1.0])


def row_of(params: SamplingParams, *, position: int = 0, request_id: int = 0) -> StepRow:
    return StepRow(request_id=request_id, position=position, token_ids=(1,), sampling=params)


def sample(logits: torch.Tensor, rows: Sequence[StepRow]) -> tuple[Sample, ...]:
    """As the first step of a stage."""
    return Sampler().sample(logits, rows)


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
        (SamplingParams(min_p=0.2, seed=6), [0, 1, 3, 5]),
        (SamplingParams(min_p=0.3, temperature=2.0, top_p=0.8, seed=7), [0, 1, 3, 5]),
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
def test_a_row_that_overflowed_says_so_and_the_others_are_sampled(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 1.0], [3.0, 1.0, 2.0]])
    rows = [row_of(SamplingParams(temperature=0), request_id=index) for index in range(3)]
    first, second, third = sample(logits, rows)
    assert [first.is_finite, second.is_finite, third.is_finite] == [True, False, True]
    assert (first.token_id, third.token_id) == (2, 0)


def test_no_rows_give_no_samples() -> None:
    assert sample(torch.empty(0, 8), []) == ()


def test_min_p_of_1_keeps_the_likeliest_alone() -> None:
    assert {s.token_id for s in draws(SamplingParams(min_p=1.0, temperature=5.0))} == {1}


def adjusted_by_definition(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    adjusted = [x + dict(params.logit_bias).get(i, 0.0) for i, x in enumerate(logits)]
    for token in {*prompt, *answer}:
        by = params.repetition_penalty
        adjusted[token] = adjusted[token] / by if adjusted[token] > 0 else adjusted[token] * by
    for token, count in Counter(answer).items():
        adjusted[token] -= params.frequency_penalty * count + params.presence_penalty
    return adjusted


TOKENS = st.lists(st.integers(0, 5), max_size=8)
AMOUNTS = st.integers(-8, 8).map(lambda n: n / 4)


@given(
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        repetition_penalty=st.sampled_from([0.5, 1.0, 1.5]),
        presence_penalty=AMOUNTS,
        frequency_penalty=AMOUNTS,
        logit_bias=st.dictionaries(st.integers(0, 5), AMOUNTS).map(lambda d: tuple(d.items())),
        num_logprobs=st.just(0),
    ),
    prompt=TOKENS,
    answer=TOKENS,
    later=TOKENS,
)
def test_penalties_and_bias_are_those_of_the_definition(
    params: SamplingParams, prompt: list[int], answer: list[int], later: list[int]
) -> None:
    sampler = Sampler()
    history = TokenHistory(prompt_ids=tuple(prompt), answer_ids=tuple(answer))
    row = replace(row_of(params), history=history)
    (drawn,) = sampler.sample(LOGITS.unsqueeze(0), [row])
    for token in later:  # one more of the answer each, as a decoding request's rows bring them
        answer = [*answer, token]
        row = StepRow(request_id=0, position=9, token_ids=(token,), sampling=params)
        (drawn,) = sampler.sample(LOGITS.unsqueeze(0), [row])
    adjusted = adjusted_by_definition(LOGITS.tolist(), params, prompt, answer)
    assert adjusted[drawn.token_id] == pytest.approx(max(adjusted), abs=1e-5)
    assert drawn.logprob == pytest.approx(float(LOGITS.log_softmax(0)[drawn.token_id]))


def test_a_request_that_begins_again_is_counted_anew() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    history = TokenHistory(prompt_ids=(1,), answer_ids=())
    sampler = Sampler()
    for _ in range(2):
        (drawn,) = sampler.sample(LOGITS.unsqueeze(0), [replace(row_of(params), history=history)])
        assert drawn.token_id == 1
        for expected in (3, 1):  # 2.0 - 1 and 1.5, then 2.0 - 1 and 1.5 - 1
            last = StepRow(request_id=0, position=9, token_ids=(drawn.token_id,), sampling=params)
            (drawn,) = sampler.sample(LOGITS.unsqueeze(0), [last])
            assert drawn.token_id == expected
    sampler.forget([0, 99])
    with pytest.raises(ValueError, match="brought no history"):
        sampler.sample(LOGITS.unsqueeze(0), [row_of(params)])


def test_a_bias_can_force_a_token_and_banned_tokens_are_never_drawn() -> None:
    forced = SamplingParams(logit_bias=((2, 100.0), (99, 100.0)))
    assert {s.token_id for s in draws(forced)} == {2}
    row = replace(row_of(SamplingParams(temperature=0.0)), banned_ids=(1, 3, 99))
    assert sample(LOGITS.unsqueeze(0), [row])[0].token_id == 5
    allowed = replace(row_of(SamplingParams()), allowed=bytes([0b10101]))
    assert {s.token_id for s in sample(LOGITS.expand(999, -1), [allowed] * 999)} <= {0, 2, 4}
    only = replace(allowed, banned_ids=(0, 2, 4))
    assert sample(LOGITS.unsqueeze(0), [only])[0].token_id in (0, 2, 4), "a grammar must go on"
    short = sample(torch.ones(1, 20), [replace(allowed, allowed=bytes([0b10]))])
    assert short[0].token_id == 1
    assert LOGITS.tolist() == [0.5, 2.0, -1.0, 1.5, 0.0, 1.0], "the logits stay as they were"
