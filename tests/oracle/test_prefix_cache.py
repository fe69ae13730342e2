"""What the KV cache gives back, a real forward pass goes on from as if it had computed it."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.request import GenerationParams, Request
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import StepPlan
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
    num_experts=4,
    num_experts_per_tok=2,
)
SOURCE = MemorySource(random_tensors(CONFIG))
NUM_KV_BLOCKS = 24
NUM_ANSWER = 12


def prompts() -> list[tuple[int, ...]]:
    """Some begin alike, one is the beginning of others, one comes twice."""
    start = torch.randint(3, 64, (70,), generator=torch.Generator().manual_seed(5)).tolist()
    tails = [(), (5,), (6, 7, 8), tuple(range(3, 30)), (5,)]
    return [(*start, *tail) for tail in tails] + [(*start[:40], 9), (4, *start)]


def answers(*, num_stages: int, reads_cache: bool) -> tuple[dict[int, list[int]], Scheduler]:
    """What greedy requests get that arrive one step after the other."""
    bounds = (0, *range(1, num_stages), CONFIG.n_layers)
    stages = Pipeline(CONFIG, SOURCE, bounds=bounds, num_kv_blocks=NUM_KV_BLOCKS).stages
    scheduler = Scheduler(
        num_kv_blocks=NUM_KV_BLOCKS,
        max_context_tokens=CONFIG.max_context_tokens,
        max_running=4,
        num_stages=num_stages,
        max_step_tokens=48,
    )
    params = GenerationParams(max_tokens=NUM_ANSWER, sampling=GREEDY, reads_cache=reads_cache)
    arriving = deque(enumerate(prompts()))
    tokens: dict[int, list[int]] = {}
    belt: deque[StepPlan] = deque()
    while arriving or scheduler.has_requests:
        if arriving:
            request_id, prompt_ids = arriving.popleft()
            scheduler.add(Request(request_id=request_id, prompt_ids=prompt_ids, params=params))
        while (plan := scheduler.schedule()) is not None:
            belt.append(plan)
        plan = belt.popleft()
        for request_id, event in scheduler.complete(run_step(stages, plan)):
            tokens.setdefault(request_id, []).append(event.token_id)
        scheduler.check_integrity()
    return tokens, scheduler


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_answers_are_the_same_with_the_cache_and_without(num_stages: int) -> None:
    cached, scheduler = answers(num_stages=num_stages, reads_cache=True)
    computed, _ = answers(num_stages=num_stages, reads_cache=False)
    assert scheduler.num_cache_hits > 200
    assert cached == computed
    assert [len(tokens) for _, tokens in sorted(cached.items())] == [NUM_ANSWER] * len(prompts())
