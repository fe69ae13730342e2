"""Tensors in memory, stages over them, and an engine of twenty lines to drive them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.fetcher.tensors import StoredDtype, TensorEntry, TensorIndex, TensorSource
from magnetar.serve.engine.stage import Stage
from magnetar.serve.engine.stage_worker import Executor
from magnetar.serve.engine.step import Sample, SamplingParams, StepPlan, StepResult, StepRow
from magnetar.settings import KV_BLOCK_TOKENS
from magnetar.tests.releases import mistral_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORED: Mapping[torch.dtype, StoredDtype] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
torch.set_num_threads(1)  # the tests share their machine

GREEDY = SamplingParams(temperature=0.0)


class MemorySource:
    """A `TensorSource` over canonical tensors; those that share a storage share an offset."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.names_read: list[str] = []

    @property
    def index(self) -> TensorIndex:
        """What there is."""
        return TensorIndex(
            {
                name: TensorEntry(
                    name=name,
                    source_name=name,
                    file="memory",
                    offset=tensor.data_ptr(),
                    dtype=_STORED[tensor.dtype],
                    shape=tuple(tensor.shape),
                )
                for name, tensor in self._tensors.items()
            }
        )

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor."""
        self.names_read.append(name)
        return self._tensors[name].clone()


def random_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical tensors of a model of this shape, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden_dim = config.dim, config.hidden_dim
    q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}"
        shapes[f"{prefix}.attention.wq"] = (q_dim, dim)
        shapes[f"{prefix}.attention.wk"] = (kv_dim, dim)
        shapes[f"{prefix}.attention.wv"] = (kv_dim, dim)
        shapes[f"{prefix}.attention.wo"] = (dim, q_dim)
        shapes[f"{prefix}.attention_norm"] = shapes[f"{prefix}.ffn_norm"] = (dim,)
        experts = [f"{prefix}.feed_forward"]
        if config.is_moe:
            shapes[f"{prefix}.feed_forward.gate"] = (config.num_experts, dim)
            experts = [f"{experts[0]}.experts.{e}" for e in range(config.num_experts)]
        for expert in experts:
            shapes[f"{expert}.w1"] = shapes[f"{expert}.w3"] = (hidden_dim, dim)
            shapes[f"{expert}.w2"] = (dim, hidden_dim)
    shapes |= {"norm": (dim,), "output": (config.vocab_size, dim)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def config_of(model: PreTrainedModel) -> ModelConfig:
    """The facts of a transformers model."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        head_dim=head_dim,
        hidden_dim=config.intermediate_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        rope_theta=config.rope_parameters["rope_theta"],
        max_context_tokens=config.max_position_embeddings,
        sliding_window=getattr(config, "sliding_window", None),
        num_experts=getattr(config, "num_local_experts", 0),
        num_experts_per_tok=getattr(config, "num_experts_per_tok", 0),
        tie_embeddings=config.tie_word_embeddings,
    )


def source_of(model: PreTrainedModel) -> MemorySource:
    """The tensors of a transformers model."""
    return MemorySource(mistral_tensors(model))


def run_step(stages: Sequence[Executor], plan: StepPlan) -> StepResult:
    """One plan through all stages, without links."""
    passed: torch.Tensor | StepResult | None = None
    for stage in stages:
        assert not isinstance(passed, StepResult)
        passed = stage.step(plan, passed)
    assert isinstance(passed, StepResult)
    return passed


class Pipeline:
    """Stages in one process, and blocks handed out in a scattered order."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        *,
        bounds: Sequence[int] | None = None,
        dtype: str = "fp32",
        num_kv_blocks: int = 256,
        scattered: bool = True,
        batch_invariant: bool = False,
        held_experts: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """`bounds` are the layers at which stages begin and the last ends; default: one stage."""
        bounds = bounds or (0, config.n_layers)
        self.stages = [
            Stage.load(
                config=config,
                source=source,
                first_layer=first,
                end_layer=end,
                has_embeddings=first == 0,
                has_output=end == config.n_layers,
                dtype=dtype,
                device="cpu",
                num_kv_blocks=num_kv_blocks,
                batch_invariant=batch_invariant,
                held_experts=held_experts,
            )
            for first, end in itertools.pairwise(bounds)
        ]
        # Multiplying by an odd number permutes a power of two.
        self._free = [(n * 37) % num_kv_blocks if scattered else n for n in range(num_kv_blocks)]
        self._positions: dict[int, int] = {}
        self._num_blocks: dict[int, int] = {}
        self._num_steps = 0

    def row(
        self, request_id: int, token_ids: Sequence[int], sampling: SamplingParams | None = GREEDY
    ) -> StepRow:
        """The next tokens of a request, with the blocks that they need."""
        position = self._positions.get(request_id, 0)
        self._positions[request_id] = position + len(token_ids)
        needed = -(-(position + len(token_ids)) // KV_BLOCK_TOKENS)
        had = self._num_blocks.get(request_id, 0)
        self._num_blocks[request_id] = needed
        new_block_ids = tuple(self._free.pop(0) for _ in range(needed - had))
        return StepRow(
            request_id=request_id,
            position=position,
            token_ids=tuple(token_ids),
            new_block_ids=new_block_ids,
            sampling=sampling,
        )

    def plan(self, *rows: StepRow, released: tuple[int, ...] = ()) -> StepPlan:
        """A step of these rows."""
        self._num_steps += 1
        return StepPlan(step_id=self._num_steps, rows=rows, released=released)

    def logits(self, *rows: StepRow) -> torch.Tensor:
        """Logits [rows with sampling, vocabulary] in fp32."""
        plan, hidden = self.plan(*rows), None
        for stage in self.stages:
            hidden = stage.forward(plan, hidden)
        assert hidden is not None
        return hidden.float()

    def step(self, *rows: StepRow) -> tuple[Sample, ...]:
        """The samples of a step."""
        return run_step(self.stages, self.plan(*rows)).samples

    def generate(
        self,
        request_id: int,
        prompt: Sequence[int],
        num_tokens: int,
        sampling: SamplingParams = GREEDY,
        chunk: int | None = None,
    ) -> list[int]:
        """Tokens after a prompt that is computed in chunks."""
        chunk = chunk or len(prompt)
        starts = range(0, len(prompt), chunk)
        for start in starts[:-1]:
            assert self.step(self.row(request_id, prompt[start : start + chunk], None)) == ()
        pending, tokens = list(prompt[starts[-1] :]), []
        for _ in range(num_tokens):
            (sampled,) = self.step(self.row(request_id, pending, sampling))
            tokens.append(sampled.token_id)
            pending = [sampled.token_id]
        return tokens
