"""Models of random weights for the benchmarks, written as Hugging Face releases.

    python benchmarks/synthetic.py FOLDER [moe|dense|tiny]

Speed does not depend on the values of the weights, but on their number and on how many experts
a step touches; a random router spreads tokens about evenly.
"""

import json
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 32000
CHUNK = 1 << 24
DONE = "made.json"
"""Written last: a folder without it is made again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The numbers that decide how fast a model can be."""

    dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0
    vocab_size: int = VOCAB_SIZE
    max_context_tokens: int = 8192

    @property
    def expert_params(self) -> int:
        """Weights of one expert, or of the feed-forward part of a dense layer."""
        return 3 * self.dim * self.hidden_dim

    @property
    def attention_params(self) -> int:
        """Weights of the four projections of a layer."""
        head_dim = self.dim // self.num_heads
        return 2 * self.dim * self.dim + 2 * self.dim * head_dim * self.num_kv_heads

    @property
    def params(self) -> int:
        """All matrices."""
        layer = self.attention_params + max(1, self.num_experts) * self.expert_params
        return self.num_layers * layer + 2 * self.vocab_size * self.dim

    def active_params(self, num_rows: int = 1) -> int:
        """Weights that a step of `num_rows` reads on average: top-2 routing, evenly spread."""
        touched = 1.0
        if self.num_experts:
            touched = self.num_experts * (1 - (1 - 2 / self.num_experts) ** num_rows)
        layer = self.attention_params + touched * self.expert_params
        return int(self.num_layers * layer + self.vocab_size * self.dim)


SHAPES = {
    # 2.43 billion weights, 0.70 of them active.
    "moe": Shape(
        dim=2048, hidden_dim=5632, num_layers=8, num_heads=16, num_kv_heads=4, num_experts=8
    ),
    # 3.77 active: 5.35 times those of `moe`, as Llama 2 70B has 5.35 times those of Mixtral 8x7B.
    "dense": Shape(dim=4096, hidden_dim=15104, num_layers=16, num_heads=32, num_kv_heads=8),
    # So little to compute that what is around it shows.
    "tiny": Shape(
        dim=64,
        hidden_dim=96,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        num_experts=8,
        vocab_size=512,
    ),
}


def write_model(folder: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Write the release unless it is there; returns its folder."""
    facts = _config(shape)
    if (folder / DONE).is_file() and json.loads((folder / DONE).read_text()) == facts:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    tensors = list(_tensors(shape))
    header, offset = {}, 0
    for name, size in tensors:
        num_bytes = 2 * math.prod(size)
        header[name] = {
            "dtype": "BF16",
            "shape": list(size),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, size in tensors:
            _write_values(file, size, generator)
    (folder / "config.json").write_text(json.dumps(facts, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(shape.vocab_size)))
    (folder / DONE).write_text(json.dumps(facts))
    return folder


def _write_values(file: Any, size: tuple[int, ...], generator: torch.Generator) -> None:
    left = math.prod(size)
    while left:
        count = min(left, CHUNK)
        values = torch.ones(count) if len(size) == 1 else torch.randn(count, generator=generator)
        if len(size) == 2:
            values *= size[1] ** -0.5  # rows of length 1 keep the hidden states in bounds
        file.write(values.to(torch.bfloat16).view(torch.uint8).numpy())
        left -= count


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim, hidden_dim = shape.dim, shape.hidden_dim
    kv_dim = dim // shape.num_heads * shape.num_kv_heads
    yield "model.embed_tokens.weight", (shape.vocab_size, dim)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (dim,)
        yield f"{prefix}.self_attn.q_proj.weight", (dim, dim)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_dim, dim)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_dim, dim)
        yield f"{prefix}.self_attn.o_proj.weight", (dim, dim)
        if not shape.num_experts:
            yield f"{prefix}.mlp.gate_proj.weight", (hidden_dim, dim)
            yield f"{prefix}.mlp.up_proj.weight", (hidden_dim, dim)
            yield f"{prefix}.mlp.down_proj.weight", (dim, hidden_dim)
            continue
        yield f"{prefix}.block_sparse_moe.gate.weight", (shape.num_experts, dim)
        for expert in range(shape.num_experts):
            of = f"{prefix}.block_sparse_moe.experts.{expert}"
            yield f"{of}.w1.weight", (hidden_dim, dim)
            yield f"{of}.w2.weight", (dim, hidden_dim)
            yield f"{of}.w3.weight", (hidden_dim, dim)
    yield "model.norm.weight", (dim,)
    yield "lm_head.weight", (shape.vocab_size, dim)


def _config(shape: Shape) -> dict[str, Any]:
    kind = "mixtral" if shape.num_experts else "mistral"
    facts: dict[str, Any] = {
        "architectures": [f"{kind.title()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.dim // shape.num_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.num_experts:
        facts |= {"num_local_experts": shape.num_experts, "num_experts_per_tok": 2}
    return facts


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """One word per token; nothing is measured with text."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {f"t{token}": token for token in range(vocab_size)},
            "unk_token": "t0",
        },
    }


if __name__ == "__main__":
    print(write_model(Path(sys.argv[1]), SHAPES[sys.argv[2] if len(sys.argv) > 2 else "moe"]))
