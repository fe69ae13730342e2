"""The executor of step plans: block tables, borders, and every device."""

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.step import StepPlan, StepResult, StepRow
from magnetar.tests.stages import GREEDY, MemorySource, Pipeline, random_tensors

CONFIG = ModelConfig(
    dim=32,
    n_layers=2,
    head_dim=8,
    hidden_dim=48,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=64,
    rope_theta=1e4,
    max_context_tokens=128,
    num_experts=4,
    num_experts_per_tok=2,
)
PROMPT = tuple(range(3, 40))


def pipeline(**options: object) -> Pipeline:
    return Pipeline(CONFIG, MemorySource(random_tensors(CONFIG)), **options)  # type: ignore[arg-type]


def plan_of(*rows: StepRow, released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(step_id=7, rows=rows, released=released)


def row_of(position: int, *tokens: int, blocks: tuple[int, ...] = ()) -> StepRow:
    return StepRow(
        request_id=1, position=position, token_ids=tokens, new_block_ids=blocks, sampling=GREEDY
    )


def test_only_rows_with_sampling_get_a_token() -> None:
    stages = pipeline()
    samples = stages.step(
        stages.row(1, PROMPT[:5], None), stages.row(2, PROMPT), stages.row(3, PROMPT[:9])
    )
    assert [sampled.request_id for sampled in samples] == [2, 3]


def test_a_released_request_starts_again_with_new_blocks() -> None:
    (stage,) = pipeline().stages
    first = stage.forward(plan_of(row_of(0, *PROMPT[:9], blocks=(3,))), None)
    with pytest.raises(ValueError, match="1 KV blocks"):
        stage.forward(plan_of(row_of(9, *PROMPT[9:20])), None)
    again = stage.forward(plan_of(row_of(0, *PROMPT[:9], blocks=(5,)), released=(1,)), None)
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="0 KV blocks"):
        stage.forward(plan_of(row_of(9, 4), released=(1,)), None)


def test_a_block_may_pass_to_another_request_in_one_step() -> None:
    (stage,) = pipeline().stages
    alone = stage.forward(plan_of(row_of(0, *PROMPT[:9], blocks=(3,))), None)
    other = StepRow(
        request_id=2, position=0, token_ids=PROMPT[:9], new_block_ids=(3,), sampling=GREEDY
    )
    assert torch.equal(stage.forward(plan_of(other, released=(1,)), None), alone)


def test_a_plan_that_only_releases_passes_through_every_stage() -> None:
    first, last = pipeline(bounds=(0, 1, 2)).stages
    hidden = first.step(plan_of(released=(4,)), None)
    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape == (0, CONFIG.dim)
    assert last.step(plan_of(released=(4,)), hidden) == StepResult(step_id=7, samples=())


def test_hidden_states_are_for_every_stage_but_the_first() -> None:
    first, last = pipeline(bounds=(0, 1, 2)).stages
    plan = plan_of(row_of(0, 5, blocks=(0,)))
    with pytest.raises(ValueError, match="hidden states"):
        first.step(plan, torch.zeros(1, CONFIG.dim))
    with pytest.raises(ValueError, match="hidden states"):
        last.step(plan, None)
    with pytest.raises(ValueError, match="step 7 has 1 tokens, but 2 came"):
        last.step(plan, torch.zeros(2, CONFIG.dim))


def test_hidden_states_are_not_modified_and_may_be_read_only() -> None:
    _, last = pipeline(bounds=(0, 1, 2)).stages
    hidden = torch.randn(3, CONFIG.dim)
    before = hidden.clone()
    last.step(plan_of(row_of(0, 5, 6, 7, blocks=(0,))), hidden)
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hidden_states_travel_in_the_compute_dtype(dtype: str) -> None:
    first, last = pipeline(bounds=(0, 1, 2), dtype=dtype).stages
    plan = plan_of(row_of(0, 5, 6, blocks=(0,)))
    hidden = first.step(plan, None)
    assert isinstance(hidden, torch.Tensor)
    assert hidden.dtype is first.hidden_dtype is last.hidden_dtype
    assert isinstance(last.step(plan, hidden), StepResult)
