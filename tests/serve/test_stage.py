"""The executor of step plans: block tables, borders, and every device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from magnetar.fetcher.config import ModelConfig
from magnetar.fetcher.tensors import TensorIndex
from magnetar.serve.engine.stage import Stage
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


class FakeSource:
    """Tensors without contents, for a `FakeTensorMode`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._index = MemorySource(tensors).index

    @property
    def index(self) -> TensorIndex:
        return self._index

    def read(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        return torch.empty(stored.shape, dtype=stored.dtype)


STEPS = (
    plan_of(
        row_of(0, *PROMPT[:20], blocks=(2, 0)),
        StepRow(request_id=2, position=0, token_ids=(4,), new_block_ids=(1,), sampling=GREEDY),
    ),
    plan_of(row_of(20, *PROMPT[20:30])),
    plan_of(row_of(30, 7)),
)
"""A whole prompt beside a single token, a chunk with a prefix, a decoding step."""


def test_the_whole_forward_pass_stays_on_a_fake_cuda_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In a build without CUDA the method asks for a device guard that is not there; the operator
    # under it does not. Inference mode hides the copies to the device from the fake mode, so the
    # pass runs without it here.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: torch.ops.aten.copy_(to, x))
    source = FakeSource(random_tensors(CONFIG))
    with FakeTensorMode(), torch.no_grad():
        stage = Stage.load(
            config=CONFIG,
            source=source,
            first_layer=0,
            end_layer=2,
            has_embeddings=True,
            has_output=True,
            dtype="bf16",
            device="cuda:0",
            num_kv_blocks=8,
            on_layer=None,
        )
        for plan in STEPS:
            logits = stage._forward(plan, None)
            assert logits.device == torch.device("cuda:0")
            assert logits.dtype is torch.bfloat16
            assert logits.shape == (len(plan.rows), CONFIG.vocab_size)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.02)])
def test_a_cuda_device_gives_the_logits_of_the_cpu(dtype: str, tolerance: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits = {}
    for device in ("cpu", "cuda:0"):
        stage = Stage.load(
            config=CONFIG,
            source=MemorySource(random_tensors(CONFIG)),
            first_layer=0,
            end_layer=2,
            has_embeddings=True,
            has_output=True,
            dtype=dtype if device != "cpu" else "fp32",
            device=device,
            num_kv_blocks=8,
            on_layer=None,
        )
        logits[device] = torch.cat([stage.forward(plan, None).float().cpu() for plan in STEPS])
    torch.testing.assert_close(logits["cuda:0"], logits["cpu"], atol=tolerance, rtol=tolerance)
