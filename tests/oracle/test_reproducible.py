"""In reproducible mode what a request gets depends, to the last bit, on nothing but itself."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.request import GenerationParams, Request, TokenEvent
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import SamplingParams, StepPlan
from magnetar.serve.model import linear
from magnetar.tests.stages import MemorySource, Pipeline, random_tensors, run_step

CONFIG = ModelConfig(
    dim=64,
    n_layers=3,
    head_dim=32,
    hidden_dim=96,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=128,
    rope_theta=1e4,
    max_context_tokens=512,
    num_experts=4,
    num_experts_per_tok=2,
)
MODELS = {
    "sparse": CONFIG,
    "dense, window": ModelConfig(
        **{
            **{name: getattr(CONFIG, name) for name in CONFIG.__slots__},
            "num_experts": 0,
            "num_experts_per_tok": 0,
            "sliding_window": 40,
            "head_dim": 24,
        }
    ),
}
GREEDY = SamplingParams(temperature=0.0, num_logprobs=3)
NUM_ANSWER = 24
ROOMY = 256


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the kernels of our own, and as where these cannot be compiled."""
    if request.param == "library":
        library_only = {
            key: tuple(name for name in names if not name.startswith("rows"))
            for key, names in linear._BEST_FIRST.items()
        }
        monkeypatch.setattr(linear, "_BEST_FIRST", library_only)
    linear.default_linear_kernel.cache_clear()
    linear.trusted_rows.cache_clear()
    yield request.param
    monkeypatch.undo()
    linear.default_linear_kernel.cache_clear()
    linear.trusted_rows.cache_clear()


@functools.cache
def source(model: str) -> MemorySource:
    return MemorySource(random_tensors(MODELS[model], seed=4))


def prompts() -> list[tuple[int, ...]]:
    """Two begin alike."""
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (70, 33, 270, 1, 9)]
    return [*map(tuple, draws), (*draws[0][:40], 5, 6)]


def params(index: int, *, reads_cache: bool) -> GenerationParams:
    """The third asks how likely its prompt is, too, and the fifth for a vector."""
    return GenerationParams(
        sampling=GREEDY,
        max_tokens=NUM_ANSWER,
        ignore_eos=True,
        num_prompt_logprobs=2 if index == 2 else None,
        pooling="mean" if index == 4 else None,
        reads_cache=reads_cache and index not in (2, 4),
    )


def serve(
    model: str,
    dtype: str,
    indices: Sequence[int],
    *,
    chunk: int = 512,
    num_stages: int = 1,
    reads_cache: bool = False,
    num_kv_blocks: int = ROOMY,
) -> tuple[dict[int, list[TokenEvent]], Scheduler]:
    """What these requests get, which arrive one step after the other."""
    stages = Pipeline(
        MODELS[model],
        source(model),
        bounds=(0, *range(1, num_stages), CONFIG.n_layers),
        dtype=dtype,
        num_kv_blocks=num_kv_blocks,
        batch_invariant=True,
    ).stages
    scheduler = Scheduler(
        num_kv_blocks=num_kv_blocks,
        max_context_tokens=CONFIG.max_context_tokens,
        max_running=min(chunk, 8),
        num_stages=num_stages,
        max_step_tokens=chunk,
    )
    arriving = deque(indices)
    events: dict[int, list[TokenEvent]] = {index: [] for index in indices}
    belt: deque[StepPlan] = deque()
    while arriving or scheduler.has_requests:
        if arriving:
            index = arriving.popleft()
            wishes = params(index, reads_cache=reads_cache)
            scheduler.add(Request(request_id=index, prompt_ids=prompts()[index], params=wishes))
        while (plan := scheduler.schedule()) is not None:
            belt.append(plan)
        plan = belt.popleft()
        for index, event in scheduler.complete(run_step(stages, plan)):
            event.num_cached_tokens = 0
            events[index].append(event)
    return events, scheduler


EVERYBODY = tuple(range(6))
SHORT = (0, 1, 3, 4, 5)
"""Without the long prompt, which token by token would be half of all steps: its answer is that."""
CASES = [
    ("compiled", "bf16", "sparse"),
    ("compiled", "int4", "dense, window"),
    ("library", "fp32", "sparse"),
    ("library", "fp32", "dense, window"),
    ("library", "bf16", "sparse"),
]
RARER_CASES = [
    ("compiled", "int8", "sparse"),
    ("compiled", "int4", "sparse"),
    ("compiled", "bf16", "dense, window"),
    ("library", "int8", "sparse"),
    ("library", "int4", "sparse"),
    ("library", "fp16", "sparse"),
]


@pytest.mark.parametrize(
    ("kernels", "dtype", "model"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARER_CASES)],
    indirect=["kernels"],
)
@pytest.mark.usefixtures("kernels")
def test_nothing_else_changes_a_bit_of_what_a_request_gets(model: str, dtype: str) -> None:
    alone: dict[int, list[TokenEvent]] = {}
    for index in EVERYBODY:
        alone |= serve(model, dtype, [index])[0]
    assert len({event.logprob for events in alone.values() for event in events}) > 50
    for chunk, indices in ((1, SHORT), (3, EVERYBODY), (16, EVERYBODY), (512, EVERYBODY)):
        chunked = serve(model, dtype, indices, chunk=chunk)[0]
        assert chunked == {index: alone[index] for index in indices}, f"chunks of {chunk}"
    # A stage for each layer parts the model wherever fewer stages would.
    many = serve(model, dtype, EVERYBODY[::-1], chunk=64, num_stages=CONFIG.n_layers)[0]
    assert many == alone, "stages"
    cached, scheduler = serve(model, dtype, EVERYBODY, reads_cache=True)
    assert scheduler.num_cache_hits > 0
    assert cached == alone, "with the cache"
    scarce, scheduler = serve(model, dtype, EVERYBODY, num_kv_blocks=20, reads_cache=True)
    assert scheduler.num_preemptions > 0
    assert scarce == alone, "preempted"
