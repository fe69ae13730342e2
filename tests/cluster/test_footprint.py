"""What a model weighs in memory."""

import pytest

from magnetar.cluster.footprint import footprint, held_bytes, matrix_format
from magnetar.cluster.machines import ComputeDtype
from magnetar.fetcher.config import ModelConfig
from magnetar.tests.stages import MemorySource, random_tensors

CONFIG = ModelConfig(
    dim=64,
    n_layers=2,
    head_dim=16,
    hidden_dim=96,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=64,
    num_experts=4,
    num_experts_per_tok=2,
)
EXPERT = "layers.0.feed_forward.experts.1.w1.weight"


def test_norms_router_and_embeddings_stay_bf16() -> None:
    for name, shape in (
        ("layers.0.ffn_norm.weight", (64,)),
        ("layers.0.feed_forward.gate.weight", (4, 64)),
        ("tok_embeddings.weight", (32, 64)),
    ):
        assert matrix_format(name, shape, "int4") == "bf16"


def test_four_bits_are_for_all_large_matrices_but_the_head() -> None:
    assert matrix_format(EXPERT, (96, 64), "int4") == "int4"
    assert matrix_format("layers.0.attention.wq.weight", (64, 64), "int4") == "int4"
    assert matrix_format("output.weight", (32, 64), "int4") == "int5"
    assert matrix_format("output.weight", (32, 64), "int8") == "int8"


def test_inputs_that_fill_no_whole_groups_stay_bf16() -> None:
    assert matrix_format(EXPERT, (96, 40), "int4") == "bf16"
    assert held_bytes(EXPERT, (96, 40), "int8") == 2 * 96 * 40


def test_scales_and_zeros_are_counted() -> None:
    assert held_bytes(EXPERT, (96, 64), "int8") == 96 * (64 + 2 + 4)
    assert held_bytes("output.weight", (96, 64), "int4") == 96 * (40 + 2 * 2 + 4)
    assert held_bytes(EXPERT, (96, 64), "int4") == 96 * (32 + 2 * 2 + 4)


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.57), ("int4", 0.35)])
def test_a_quantised_model_is_as_small_as_its_bits_say(dtype: ComputeDtype, share: float) -> None:
    index = MemorySource(random_tensors(CONFIG)).index
    weights = footprint(CONFIG, index, dtype)
    in_bf16 = footprint(CONFIG, index, "bf16")
    assert sum(weights.layer_bytes) < share * sum(in_bf16.layer_bytes)
    assert weights.embeddings_bytes == in_bf16.embeddings_bytes
    assert weights.kv_bytes_per_token == in_bf16.kv_bytes_per_token
