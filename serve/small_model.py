"""A model of small layers: much of what its steps take is what surrounds computing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..fetcher.config import ModelConfig
from ..fetcher.tensors import TensorEntry, TensorIndex
from ..settings import KV_BLOCK_TOKENS
from .engine.step import SamplingParams, StepPlan, StepRow

if TYPE_CHECKING:
    import torch

    from ..cluster.machines import ComputeDtype
    from .engine.stage import Stage
    from .model.loader import LayerExperts

STREAM_TOKENS = 32
"""After so many a stream ends and the next one begins: what a step takes grows with its context."""
NUM_BLOCKS = STREAM_TOKENS // KV_BLOCK_TOKENS
_GREEDY = SamplingParams(temperature=0.0)


def small_config(num_layers: int) -> ModelConfig:
    """Of layers as small as those of the demo's model."""
    return ModelConfig(
        dim=512,
        n_layers=num_layers,
        head_dim=64,
        hidden_dim=1536,
        n_heads=8,
        n_kv_heads=2,
        norm_eps=1e-5,
        vocab_size=512,
        rope_theta=1e4,
        max_context_tokens=STREAM_TOKENS,
        num_experts=8,
        num_experts_per_tok=2,
    )


def small_layer_bytes(dtype: ComputeDtype) -> int:
    """What one token reads of a layer."""
    from ..cluster.search.cost import model_cost

    config = small_config(1)
    cost = model_cost(config, Noise(config).index, dtype)
    return cost.attention_bytes[0] + cost.experts_per_token * cost.expert_bytes[0]


def small_stage(
    num_layers: int, *, dtype: ComputeDtype, device: str, held_experts: LayerExperts | None = None
) -> Stage:
    """The whole model as one stage; of `held_experts` see `Stage.load`."""
    from .engine.stage import Stage

    config = small_config(num_layers)
    return Stage.load(
        config=config,
        source=Noise(config),
        first_layer=0,
        end_layer=num_layers,
        has_embeddings=True,
        has_output=True,
        dtype=dtype,
        device=device,
        num_kv_blocks=NUM_BLOCKS,
        held_experts=held_experts,
    )


def small_step(step_id: int) -> StepPlan:
    """One token of one stream, one stream after the other; steps must come from 0 on."""
    stream, position = divmod(step_id, STREAM_TOKENS)
    begins = position == 0
    row = StepRow(
        request_id=stream,
        position=position,
        token_ids=(position,),
        new_block_ids=tuple(range(NUM_BLOCKS)) if begins else (),
        sampling=_GREEDY,
    )
    return StepPlan(
        step_id=step_id, rows=(row,), released=(stream - 1,) if begins and stream else ()
    )


class Noise:
    """A `TensorSource` of a small model: random numbers in the shapes that the loader asks for."""

    def __init__(self, config: ModelConfig) -> None:
        dim, hidden, heads = config.dim, config.hidden_dim, config.n_heads * config.head_dim
        keys = config.n_kv_heads * config.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, dim)}
        for layer in range(config.n_layers):
            at = f"layers.{layer}"
            for part, rows in (("wq", heads), ("wk", keys), ("wv", keys)):
                shapes[f"{at}.attention.{part}"] = (rows, dim)
            shapes[f"{at}.attention.wo"] = (dim, heads)
            shapes |= {f"{at}.{norm}": (dim,) for norm in ("attention_norm", "ffn_norm")}
            shapes[f"{at}.feed_forward.gate"] = (config.num_experts, dim)
            for expert in range(config.num_experts):
                of = f"{at}.feed_forward.experts.{expert}"
                shapes |= {f"{of}.w1": (hidden, dim), f"{of}.w3": (hidden, dim)}
                shapes[f"{of}.w2"] = (dim, hidden)
        shapes |= {"norm": (dim,), "output": (config.vocab_size, dim)}
        self.index = TensorIndex(
            {
                f"{name}.weight": TensorEntry(
                    name=f"{name}.weight",
                    source_name=name,
                    file="noise",
                    offset=number,
                    dtype="bf16",
                    shape=shape,
                )
                for number, (name, shape) in enumerate(shapes.items())
            }
        )

    def read(self, name: str) -> torch.Tensor:
        """Small numbers, so that nothing overflows; few different ones, so that it is quick."""
        import torch

        shape = self.index[name].shape
        few = torch.randn(4093, dtype=torch.bfloat16) * 0.1
        num_values = math.prod(shape)
        return few.repeat(-(-num_values // len(few)))[:num_values].view(shape)
