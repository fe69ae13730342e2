"""Penalties, scores of prompts and pooled vectors do not depend on how the work is cut up."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.request import GenerationParams, Request, TokenEvent
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import SamplingParams, ScoredToken, StepPlan
from magnetar.serve.engine.step_codec import decode_plan, decode_result, encode_plan, encode_result
from magnetar.tests.stages import GREEDY, MemorySource, Pipeline, random_tensors, run_step

CONFIG = ModelConfig(
    dim=32,
    n_layers=3,
    head_dim=8,
    hidden_dim=48,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=64,
    rope_theta=1e4,
    max_context_tokens=256,
)
EOS = 7
ROOMY, SCARCE = 64, 9
PENALISED = SamplingParams(
    temperature=0.7, seed=5, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3
)
CUTS = pytest.mark.parametrize(
    ("bounds", "max_step_tokens", "num_kv_blocks"),
    [
        ((0, 3), 512, ROOMY),
        ((0, 3), 3, SCARCE),
        ((0, 1, 3), 16, SCARCE),
        ((0, 1, 2, 3), 5, SCARCE),
    ],
)


def prompt(index: int, num_tokens: int) -> tuple[int, ...]:
    """Begins with the same block for every index, which may come from the cache."""
    own = [(11 * index + 3 * n) % 64 for n in range(num_tokens - 16)]
    return (*range(16), *own)[:num_tokens]


def serve(
    requests: Sequence[tuple[tuple[int, ...], GenerationParams]],
    *,
    bounds: Sequence[int] = (0, 3),
    max_step_tokens: int = 512,
    num_kv_blocks: int = ROOMY,
) -> tuple[list[list[TokenEvent]], int]:
    """Each request's events, and how often one was preempted; every message goes as bytes."""
    pipeline = Pipeline(
        CONFIG, MemorySource(random_tensors(CONFIG)), bounds=bounds, num_kv_blocks=num_kv_blocks
    )
    scheduler = Scheduler(
        num_kv_blocks=num_kv_blocks,
        max_context_tokens=256,
        max_running=3,
        num_stages=len(pipeline.stages),
        eos_token_ids=frozenset({EOS}),
        max_step_tokens=max_step_tokens,
    )
    for request_id, (prompt_ids, params) in enumerate(requests):
        scheduler.add(Request(request_id=request_id, prompt_ids=prompt_ids, params=params))
    events: list[list[TokenEvent]] = [[] for _ in requests]
    belt: deque[StepPlan] = deque()
    while scheduler.has_requests:
        while (plan := scheduler.schedule()) is not None:
            belt.append(decode_plan(plan.step_id, encode_plan(plan)))
        plan = belt.popleft()
        for request_id, event in scheduler.complete(
            decode_result(plan.step_id, encode_result(run_step(pipeline.stages, plan)))
        ):
            events[request_id].append(event)
    return events, scheduler.num_preemptions


def penalised_requests() -> list[tuple[tuple[int, ...], GenerationParams]]:
    return [
        (
            prompt(index, 20 + 7 * index),
            GenerationParams(
                sampling=replace(PENALISED, seed=index), max_tokens=30, ignore_eos=True
            ),
        )
        for index in range(4)
    ]


@CUTS
def test_penalties_count_the_same_tokens_however_the_work_is_cut(
    bounds: tuple[int, ...], max_step_tokens: int, num_kv_blocks: int
) -> None:
    requests = penalised_requests()
    alone = [serve([request])[0][0] for request in requests]
    together, num_preemptions = serve(
        requests, bounds=bounds, max_step_tokens=max_step_tokens, num_kv_blocks=num_kv_blocks
    )
    tokens = [[event.token_id for event in events] for events in together]
    assert tokens == [[event.token_id for event in events] for events in alone]
    assert (num_preemptions > 0) == (num_kv_blocks == SCARCE)


def test_a_frequency_penalty_lets_no_token_come_twice_before_all_others_came() -> None:
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0, logit_bias=((9, 50.0),))
    biased = GenerationParams(sampling=sampling, max_tokens=20, ignore_eos=True)
    ((events,), _) = serve([(prompt(0, 20), biased)])
    assert {event.token_id for event in events} == {9}, "50 outweighs 20 times 2"
    sampling = SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    varied = replace(biased, sampling=replace(sampling, repetition_penalty=100.0))
    ((events,), _) = serve([(prompt(0, 20), varied)])
    assert len({event.token_id for event in events}) == 20


def test_an_answer_does_not_end_before_min_tokens() -> None:
    forced = replace(GREEDY, logit_bias=((EOS, 99.0), (8, 50.0)))
    params = GenerationParams(sampling=forced, max_tokens=20, min_tokens=5)
    ((events,), _) = serve([(prompt(0, 20), params)])
    assert [event.token_id for event in events] == [8] * 5 + [EOS]
    stopped = replace(params, stop_token_ids=frozenset({8}), min_tokens=2)
    ((events,), _) = serve([(prompt(0, 20), stopped)])
    assert [event.finish_reason for event in events] == [None, None, "stop"]


class Counting:
    """A `Grammar`: token 20, 21, 22 and so on, and the end after 12 of them."""

    def __init__(self) -> None:
        self.num_accepted = 0

    def start(self) -> Counting:
        return Counting()

    def allowed(self) -> bytes:
        return (1 << (EOS if self.num_accepted == 12 else 20 + self.num_accepted)).to_bytes(
            8, "little"
        )

    def accept(self, token_id: int) -> None:
        self.num_accepted += 1


@CUTS
def test_a_grammar_goes_on_where_it_was(
    bounds: tuple[int, ...], max_step_tokens: int, num_kv_blocks: int
) -> None:
    params = GenerationParams(sampling=PENALISED, max_tokens=30, grammar=Counting())
    requests = [(prompt(index, 30 + 7 * index), params) for index in range(4)]
    requests.append(penalised_requests()[0])
    answers, _ = serve(
        requests, bounds=bounds, max_step_tokens=max_step_tokens, num_kv_blocks=num_kv_blocks
    )
    for events in answers[:4]:
        assert [event.token_id for event in events] == [*range(20, 32), EOS]


def scores_by_definition(prompt_ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [len(prompt) - 1, vocabulary] of a whole pass."""
    pipeline = Pipeline(CONFIG, MemorySource(random_tensors(CONFIG)))
    logits = [pipeline.logits(pipeline.row(0, [token])) for token in prompt_ids[:-1]]
    return torch.cat(logits).log_softmax(dim=-1)


@CUTS
def test_every_token_of_a_prompt_is_scored_once(
    bounds: tuple[int, ...], max_step_tokens: int, num_kv_blocks: int
) -> None:
    scoring = GenerationParams(
        sampling=GREEDY,
        max_tokens=30,
        ignore_eos=True,
        num_prompt_logprobs=2,
        reads_cache=False,
    )
    requests = [(prompt(index, 80 - index), scoring) for index in (0, 1, 2)]
    requests = [(prompt(9, 40), replace(scoring, num_prompt_logprobs=None)), *requests]
    answers, _ = serve(
        requests, bounds=bounds, max_step_tokens=max_step_tokens, num_kv_blocks=num_kv_blocks
    )
    assert answers[0][0].scored == ()
    for (prompt_ids, _), events in zip(requests[1:], answers[1:], strict=True):
        scored = events[0].scored
        assert [each.token_id for each in scored] == list(prompt_ids[1:])
        assert all(event.scored == () for event in events[1:])
        for each, logprobs in zip(scored, scores_by_definition(prompt_ids), strict=True):
            check_score(each, logprobs)


def check_score(scored: ScoredToken, logprobs: torch.Tensor) -> None:
    ranked = logprobs.argsort(descending=True).tolist()
    assert scored.logprob == pytest.approx(float(logprobs[scored.token_id]), abs=1e-4)
    assert scored.rank == ranked.index(scored.token_id) + 1
    assert [token_id for token_id, _ in scored.top_logprobs] == ranked[:2]
    if scored.rank <= 2:
        assert scored.top_logprobs[scored.rank - 1] == (scored.token_id, scored.logprob)


@CUTS
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_pooled_from_every_token(
    pooling: str, bounds: tuple[int, ...], max_step_tokens: int, num_kv_blocks: int
) -> None:
    embedding = GenerationParams(
        sampling=GREEDY,
        max_tokens=1,
        pooling="last" if pooling == "last" else "mean",
        reads_cache=False,
    )
    prompts = [prompt(index, 50 + index) for index in range(4)]
    answers, _ = serve(
        [(prompt_ids, embedding) for prompt_ids in prompts],
        bounds=bounds,
        max_step_tokens=max_step_tokens,
        num_kv_blocks=num_kv_blocks,
    )
    for prompt_ids, (event,) in zip(prompts, answers, strict=True):
        vector = torch.tensor(event.vector)
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(vector, vector_by_definition(prompt_ids, pooling))


def vector_by_definition(prompt_ids: tuple[int, ...], pooling: str) -> torch.Tensor:
    """Over a pass of one token at a time through every layer but the head."""
    pipeline = Pipeline(CONFIG, MemorySource(random_tensors(CONFIG)))
    (stage,) = pipeline.stages
    states = []
    for token in prompt_ids:
        with torch.inference_mode():
            states.append(stage._compute(pipeline.plan(pipeline.row(0, [token])), None)[0])
    hidden = torch.stack(states)
    normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()
    normed = normed * random_tensors(CONFIG)["norm.weight"]
    pooled = normed[-1] if pooling == "last" else normed.mean(0)
    return torch.nn.functional.normalize(pooled, dim=0)
