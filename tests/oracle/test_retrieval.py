"""A model that looks things up: at 32k tokens it still finds what was said once, and where.

Its weights are set by hand. In the first layer every token attends to the one just before it, by
position alone, and keeps what it was. In the second a token attends to those that came after a
token like itself, and says what they are: after "... key value ... key" comes "value". A wrong
position, block or window leads to another answer.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.settings import KV_BLOCK_TOKENS
from magnetar.tests.stages import GREEDY, MemorySource, Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTENT, PREVIOUS, CONSTANT, FOUND = (slice(start, start + 16) for start in (0, 16, 32, 48))
"""What the 64 numbers of a hidden state are for."""
NUM_TOKENS = 32768
CHUNK = 512
ROPE_THETA = 1e12
"""The upper half of the pairs turns by less than 0.04 in 32k positions: it compares contents."""
KEYS, VALUES = (29, 30, 31), (3, 4, 5)
TOLERANCE = 1e-3


def config(*, window: int | None = None) -> ModelConfig:
    return ModelConfig(
        dim=64,
        n_layers=2,
        head_dim=32,
        hidden_dim=32,
        n_heads=2,
        n_kv_heads=1,
        norm_eps=1e-6,
        vocab_size=32,
        rope_theta=ROPE_THETA,
        max_context_tokens=NUM_TOKENS,
        sliding_window=window,
    )


def codes() -> torch.Tensor:
    """For each of 32 tokens 16 signs, of which no two agree in more than half."""
    rows = torch.ones(1, 1)
    for _ in range(4):
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return torch.cat([rows, -rows])


@functools.cache
def tensors() -> dict[str, torch.Tensor]:
    """Canonical tensors of the model; the second query head of each layer says nothing."""
    made = {
        "tok_embeddings.weight": torch.zeros(32, 64),
        "norm.weight": torch.ones(64),
        "output.weight": torch.zeros(32, 64),
    }
    made["tok_embeddings.weight"][:, CONTENT] = codes()
    made["tok_embeddings.weight"][:, CONSTANT] = 1.0
    made["output.weight"][:, FOUND] = codes()
    for layer in range(2):
        prefix = f"layers.{layer}"
        made |= {
            f"{prefix}.attention_norm.weight": torch.ones(64),
            f"{prefix}.ffn_norm.weight": torch.ones(64),
            f"{prefix}.attention.wq.weight": torch.zeros(64, 64),
            f"{prefix}.attention.wk.weight": torch.zeros(32, 64),
            f"{prefix}.attention.wv.weight": torch.zeros(32, 64),
            f"{prefix}.attention.wo.weight": torch.zeros(64, 64),
            f"{prefix}.feed_forward.w1.weight": torch.zeros(32, 64),
            f"{prefix}.feed_forward.w2.weight": torch.zeros(64, 32),
            f"{prefix}.feed_forward.w3.weight": torch.zeros(32, 64),
        }
        made[f"{prefix}.attention.wv.weight"][:16, CONTENT] = torch.eye(16)
    # Pairs turned back by one position meet those of the token before without an angle.
    turns = ROPE_THETA ** -(torch.arange(16) / 16)
    made["layers.0.attention.wq.weight"][0:32:2, 32] = 300.0 * turns.cos()
    made["layers.0.attention.wq.weight"][1:32:2, 32] = -300.0 * turns.sin()
    made["layers.0.attention.wk.weight"][0:32:2, 32] = 1.0
    made["layers.0.attention.wo.weight"][PREVIOUS, :16] = torch.eye(16)
    made["layers.1.attention.wq.weight"][16:32, CONTENT] = 20.0 * torch.eye(16)
    made["layers.1.attention.wk.weight"][16:32, PREVIOUS] = torch.eye(16)
    made["layers.1.attention.wo.weight"][FOUND, :16] = torch.eye(16)
    return made


def in_transformers(window: int | None) -> PreTrainedModel:
    """The same model, with the rows of queries and keys in half-split order."""
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=NUM_TOKENS,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_theta": ROPE_THETA, "rope_type": "default"},
            sliding_window=window,
            attn_implementation="sdpa",
        )
    ).eval()
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, weight in tensors().items():
        part = name.removesuffix(".weight")
        where = ""
        if part.startswith("layers."):
            _, layer, part = part.split(".", 2)
            where = f"model.layers.{layer}."
        if part in ("attention.wq", "attention.wk"):
            weight = weight.view(-1, 16, 2, 64).transpose(1, 2).reshape(weight.shape)
        state[f"{where}{names[part]}.weight"] = weight
    model.load_state_dict(state)
    return model


def prompt_of(num_tokens: int, ages: tuple[int, ...]) -> list[int]:
    """Ends in the keys, each of which stands that long before its end, with its value behind."""
    generator = torch.Generator().manual_seed(6)
    prompt = torch.randint(6, 29, (num_tokens,), generator=generator).tolist()
    prompt[-len(KEYS) :] = KEYS
    for index, age in enumerate(ages):
        at = num_tokens - len(KEYS) + index - age
        prompt[at : at + 2] = [KEYS[index], VALUES[index]]
    return prompt


def end_logits(
    prompt: list[int], *, dtype: str, window: int | None = None, batch_invariant: bool = False
) -> torch.Tensor:
    """Of the last tokens, which are computed one by one after the prompt in chunks."""
    pipeline = Pipeline(
        config(window=window),
        MemorySource(tensors()),
        bounds=(0, 1, 2),
        dtype=dtype,
        num_kv_blocks=1 << (len(prompt) // KV_BLOCK_TOKENS).bit_length(),
        batch_invariant=batch_invariant,
    )
    end = len(prompt) - len(KEYS)
    for start in range(0, end, CHUNK):
        pipeline.step(pipeline.row(0, prompt[start : min(start + CHUNK, end)], None))
    return torch.cat([pipeline.logits(pipeline.row(0, [key], GREEDY)) for key in prompt[end:]])


WAYS = [("fp32", False), ("fp32", True), ("bf16", False), ("int8", False)]


@pytest.mark.parametrize(("dtype", "batch_invariant"), WAYS)
def test_values_are_found_by_their_keys_at_any_distance(dtype: str, batch_invariant: bool) -> None:
    num_tokens = 3000
    prompt = prompt_of(num_tokens, ages=(num_tokens - 4, 1500, 18))
    logits = end_logits(prompt, dtype=dtype, batch_invariant=batch_invariant)
    assert logits.argmax(dim=-1).tolist() == list(VALUES)


def test_what_lies_outside_the_window_is_not_found() -> None:
    prompt = prompt_of(3000, ages=(1001, 1000, 2500))
    ours = end_logits(prompt, dtype="fp32", window=1000)
    with torch.no_grad():
        theirs = in_transformers(1000)(torch.tensor([prompt]), logits_to_keep=3).logits[0]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    # The second value is the farthest token that its key sees, 999 back.
    assert (ours.argmax(dim=-1) == torch.tensor(VALUES)).tolist() == [False, True, False]


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
@pytest.mark.parametrize(("dtype", "batch_invariant"), WAYS)
def test_values_are_found_by_their_keys_32k_tokens_later(dtype: str, batch_invariant: bool) -> None:
    prompt = prompt_of(NUM_TOKENS, ages=(NUM_TOKENS - 4, 9001, 18))
    ours = end_logits(prompt, dtype=dtype, batch_invariant=batch_invariant)
    assert ours.argmax(dim=-1).tolist() == list(VALUES)
    if dtype == "fp32":
        torch.testing.assert_close(ours, theirs_at_32k(), atol=TOLERANCE, rtol=TOLERANCE)


@functools.cache
def theirs_at_32k() -> torch.Tensor:
    prompt = prompt_of(NUM_TOKENS, ages=(NUM_TOKENS - 4, 9001, 18))
    with torch.no_grad():
        logits: torch.Tensor = in_transformers(None)(
            torch.tensor([prompt]), logits_to_keep=3
        ).logits[0]
    return logits
