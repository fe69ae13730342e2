"""The forward pass on a card: on a fake one everywhere, on a real one where there is one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from magnetar.fetcher.config import ModelConfig
from magnetar.fetcher.tensors import TensorIndex
from magnetar.serve.engine.helper import Helper
from magnetar.serve.engine.stage import Stage
from magnetar.serve.engine.step import StepPlan, StepRow
from magnetar.serve.model import invariant, loader
from magnetar.serve.model.invariant import STRETCH
from magnetar.settings import KV_BLOCK_TOKENS
from magnetar.tests.stages import GREEDY, MemorySource, random_tensors

SPARSE = ModelConfig(
    dim=32,
    n_layers=2,
    head_dim=8,
    hidden_dim=64,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=64,
    rope_theta=1e4,
    max_context_tokens=512,
    num_experts=4,
    num_experts_per_tok=2,
)
DENSE = replace(SPARSE, num_experts=0, num_experts_per_tok=0, sliding_window=24)
PROMPT = tuple((7 * n) % 64 for n in range(STRETCH + 40))
NUM_KV_BLOCKS = 32
CUDA = torch.device("cuda:0")


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


def row_of(request_id: int, start: int, end: int, blocks: tuple[int, ...] = ()) -> StepRow:
    return StepRow(
        request_id=request_id,
        position=start,
        token_ids=PROMPT[start:end],
        new_block_ids=blocks,
        sampling=GREEDY,
    )


def steps() -> list[StepPlan]:
    """A prompt beside a single token, a chunk with a prefix in scattered blocks, and decoding."""
    num_blocks = len(PROMPT) // KV_BLOCK_TOKENS + 1
    blocks = tuple(range(NUM_KV_BLOCKS - 1, NUM_KV_BLOCKS - 1 - num_blocks, -1))
    rows = [
        (row_of(1, 0, 20, blocks), row_of(2, 0, 1, (0,))),
        (row_of(1, 20, STRETCH + 30), row_of(2, 1, 2)),
        (row_of(1, STRETCH + 30, STRETCH + 31),),
    ]
    return [StepPlan(step_id=number, rows=each) for number, each in enumerate(rows)]


def stage_of(config: ModelConfig, source: FakeSource | MemorySource, **options: object) -> Stage:
    return Stage.load(
        config=config,
        source=source,
        first_layer=0,
        end_layer=2,
        has_embeddings=True,
        has_output=True,
        num_kv_blocks=NUM_KV_BLOCKS,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def _tried_kernels() -> None:
    """The kernels of this machine try themselves once, on numbers that are there."""
    stage_of(SPARSE, MemorySource(random_tensors(SPARSE)), dtype="bf16", device="cpu")


@pytest.fixture
def _fake_cuda(_tried_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fake card cannot do: tell numbers, and copy in a build without CUDA."""
    # In such a build the method asks for a device guard that is not there; the operator under it
    # does not. Inference mode hides the copies to the device from the fake mode, so the pass runs
    # without it here.
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: torch.ops.aten.copy_(to, x))
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: [n % 4 for n in range(x.numel())])
    monkeypatch.setattr(invariant, "_self_test", lambda name, device: None)
    monkeypatch.setattr(loader._Loader, "_check_range", lambda loader, name, weight: None)


@pytest.mark.usefixtures("_fake_cuda")
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_the_whole_forward_pass_stays_on_a_fake_card(
    config: ModelConfig, dtype: str, batch_invariant: bool
) -> None:
    source = FakeSource(random_tensors(config))
    with FakeTensorMode(), torch.no_grad():
        stage = stage_of(
            config, source, dtype=dtype, device="cuda:0", batch_invariant=batch_invariant
        )
        for plan in steps():
            logits = stage._forward(plan, None)
            assert logits.device == CUDA
            assert logits.dtype is stage.hidden_dtype
            assert logits.shape == (len(plan.rows), config.vocab_size)


@pytest.mark.usefixtures("_fake_cuda")
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_experts_of_a_helper_stay_on_a_fake_card(dtype: str) -> None:
    source = FakeSource(random_tensors(SPARSE))
    with FakeTensorMode(), torch.no_grad():
        helper = Helper.load(
            config=SPARSE, source=source, experts={1: range(4)}, dtype=dtype, device="cuda:0"
        )
        outputs = helper._layers[1].outputs(
            torch.empty(3, SPARSE.dim, dtype=torch.bfloat16, device=CUDA),
            [0, 1, 2, 2],
            [1, 0, 3, 2],
        )
        assert outputs.device == CUDA
        assert outputs.shape == (4, SPARSE.dim)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.02)])
def test_a_card_gives_the_logits_of_the_cpu(
    config: ModelConfig, dtype: str, tolerance: float, batch_invariant: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    source, logits = MemorySource(random_tensors(config)), []
    for device, computed in (("cpu", "fp32"), ("cuda:0", dtype)):
        stage = stage_of(
            config, source, dtype=computed, device=device, batch_invariant=batch_invariant
        )
        logits.append(torch.cat([stage.forward(plan, None).float().cpu() for plan in steps()]))
    torch.testing.assert_close(logits[1], logits[0], atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_card_in_reproducible_mode_feels_no_chunks_and_no_neighbours(dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    outcomes = []
    for chunk in (len(PROMPT), 100, 7):
        stage = stage_of(
            SPARSE,
            MemorySource(random_tensors(SPARSE)),
            dtype=dtype,
            device="cuda:0",
            batch_invariant=True,
        )
        blocks = tuple(range(1, 20))
        neighbour = row_of(2, 0, 1 + chunk // 9, (0, 20, 21))
        for start, end in itertools.pairwise([*range(0, len(PROMPT), chunk), len(PROMPT)]):
            rows = [row_of(1, start, end, () if start else blocks)]
            rows += [neighbour] if start == 0 else []
            logits = stage.forward(StepPlan(step_id=start, rows=tuple(rows)), None)[0]
        outcomes.append(logits)
    assert all(torch.equal(logits, outcomes[0]) for logits in outcomes)
