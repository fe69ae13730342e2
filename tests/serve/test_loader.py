"""Loading one stage's weights, and accounting for every tensor."""

import dataclasses

import pytest
import torch

from magnetar.cluster.footprint import footprint
from magnetar.cluster.machines import ComputeDtype
from magnetar.errors import CheckpointError, UsageError
from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.stage import Stage
from magnetar.tests.stages import MemorySource, random_tensors

CONFIG = ModelConfig(
    dim=16,
    n_layers=3,
    head_dim=8,
    hidden_dim=24,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=64,
    num_experts=4,
    num_experts_per_tok=2,
)


def load(
    source: MemorySource,
    *,
    layers: tuple[int, int] = (0, 3),
    dtype: str = "fp32",
    config: ModelConfig = CONFIG,
    heard: list[int] | None = None,
) -> Stage:
    return Stage.load(
        config=config,
        source=source,
        first_layer=layers[0],
        end_layer=layers[1],
        has_embeddings=layers[0] == 0,
        has_output=layers[1] == config.n_layers,
        dtype=dtype,
        device="cpu",
        num_kv_blocks=4,
        on_layer=None if heard is None else heard.append,
    )


def test_a_stage_reads_its_own_tensors_once_and_no_others() -> None:
    source = MemorySource(random_tensors(CONFIG))
    load(source, layers=(1, 2))
    expected = [name for name in random_tensors(CONFIG) if name.startswith("layers.1.")]
    assert sorted(source.names_read) == sorted(expected)


def test_all_stages_together_read_everything() -> None:
    source = MemorySource(random_tensors(CONFIG))
    for layers in ((0, 1), (1, 2), (2, 3)):
        load(source, layers=layers)
    assert sorted(source.names_read) == sorted(random_tensors(CONFIG))


@pytest.mark.parametrize(("dtype", "num_bytes"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_counts_the_bytes_of_the_weights_in_the_compute_dtype(dtype: str, num_bytes: int) -> None:
    tensors = random_tensors(CONFIG)
    heard: list[int] = []
    stage = load(MemorySource(tensors), dtype=dtype, heard=heard)
    assert stage.loaded_bytes == num_bytes * sum(t.numel() for t in tensors.values())
    assert len(heard) == CONFIG.n_layers + 2
    assert heard == sorted(heard)
    assert heard[-1] == stage.loaded_bytes


def test_tied_embeddings_are_read_and_held_once_where_products_use_the_weight_itself() -> None:
    tensors = random_tensors(CONFIG)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    source = MemorySource(tensors)
    stage = load(source, dtype="fp16")
    assert "output.weight" not in source.names_read
    distinct = sum(t.numel() for name, t in tensors.items() if name != "output.weight")
    assert stage.loaded_bytes == 2 * distinct
    assert load(source, layers=(2, 3), dtype="fp16").loaded_bytes > 0
    assert "output.weight" in source.names_read


def test_a_missing_tensor_is_named() -> None:
    tensors = random_tensors(CONFIG)
    del tensors["layers.1.feed_forward.experts.2.w3.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.feed_forward\.experts\.2\.w3"):
        load(MemorySource(tensors))


@pytest.mark.parametrize(
    "name",
    ["layers.1.attention.wq.bias", "layers.9.ffn_norm.weight", "vision.patch.weight"],
)
def test_a_tensor_of_no_part_of_the_model_is_named(name: str) -> None:
    tensors = random_tensors(CONFIG) | {name: torch.zeros(3)}
    with pytest.raises(CheckpointError, match=name):
        load(MemorySource(tensors), layers=(1, 2))


def test_a_dense_model_refuses_experts() -> None:
    config = dataclasses.replace(CONFIG, num_experts=0, num_experts_per_tok=0)
    with pytest.raises(CheckpointError, match="no part of the model"):
        load(MemorySource(random_tensors(CONFIG)), config=config)


def test_a_wrong_shape_is_said_with_both_shapes() -> None:
    tensors = random_tensors(CONFIG) | {"layers.0.attention.wo.weight": torch.zeros(16, 8)}
    with pytest.raises(CheckpointError, match=r"\[16, 8\].*\[16, 16\]"):
        load(MemorySource(tensors))


def test_values_beyond_fp16_are_refused_and_not_made_infinite() -> None:
    tensors = random_tensors(CONFIG)
    tensors["layers.2.feed_forward.experts.0.w1.weight"][0, 0] = 1e6
    load(MemorySource(tensors), dtype="bf16")
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1.*fp16"):
        load(MemorySource(tensors), dtype="fp16")


def test_an_unknown_dtype_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="fp8"):
        load(MemorySource(random_tensors(CONFIG)), dtype="fp8")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_quantised_stage_holds_what_the_planner_counts(dtype: ComputeDtype) -> None:
    config = dataclasses.replace(CONFIG, dim=32, hidden_dim=64, head_dim=16)
    source = MemorySource(random_tensors(config))
    heard: list[int] = []
    stage = load(source, dtype=dtype, config=config, heard=heard)
    assert stage.hidden_dtype is torch.bfloat16
    assert heard[-1] == stage.loaded_bytes
    assert stage.loaded_bytes == footprint(config, source.index, dtype).weights_bytes
