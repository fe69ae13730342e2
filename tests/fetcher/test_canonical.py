from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given as draw
from hypothesis import strategies as st

from magnetar.errors import CheckpointError, ReleaseError
from magnetar.fetcher.checkpoint.canonical import (
    Naming,
    canonical_index,
    detect_naming,
    expected_tensors,
)
from magnetar.fetcher.checkpoint.stored_tensor import StoredTensor
from magnetar.fetcher.config import ModelConfig

MOE = ModelConfig(
    dim=64,
    n_layers=2,
    head_dim=16,
    hidden_dim=96,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=512,
    rope_theta=1e6,
    max_context_tokens=512,
    num_experts=4,
    num_experts_per_tok=2,
)
DENSE = replace(MOE, num_experts=0, num_experts_per_tok=0)
NAMINGS: tuple[Naming, ...] = ("mistral", "huggingface")  # "fused" has tests of its own


def stored(config: ModelConfig, naming: Naming) -> list[StoredTensor]:
    found = []
    offset = 0
    for expected in expected_tensors(config):
        tensor = StoredTensor(
            name=expected.name if naming == "mistral" else expected.huggingface_name,
            file="weights",
            offset=offset,
            dtype="bf16",
            shape=expected.shape,
        )
        offset += tensor.num_bytes
        found.append(tensor)
    return found


def without(tensors: Iterable[StoredTensor], *names: str) -> list[StoredTensor]:
    return [tensor for tensor in tensors if tensor.name not in names]


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_maps_every_tensor_in_model_order(config: ModelConfig, naming: Naming) -> None:
    given = stored(config, naming)

    index = canonical_index(list(reversed(given)), config)

    assert [entry.name for entry in index] == [tensor.name for tensor in expected_tensors(config)]
    assert [entry.offset for entry in index] == [tensor.offset for tensor in given]
    assert detect_naming(tensor.name for tensor in given) == naming


def test_only_q_and_k_of_hugging_face_have_permuted_rows() -> None:
    ours = canonical_index(stored(MOE, "mistral"), MOE)
    theirs = canonical_index(stored(MOE, "huggingface"), MOE)

    assert {entry.rope_permuted_heads for entry in ours} == {0}
    assert {
        entry.name: entry.rope_permuted_heads for entry in theirs if entry.rope_permuted_heads
    } == {
        f"layers.{layer}.attention.{projection}.weight": heads
        for layer in range(2)
        for projection, heads in (("wq", 4), ("wk", 2))
    }


def test_names_are_those_of_the_two_layouts() -> None:
    index = canonical_index(stored(MOE, "huggingface"), MOE)

    expert = index["layers.1.feed_forward.experts.3.w2.weight"]
    assert expert.source_name == "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert expert.shape == (64, 96)
    dense = canonical_index(stored(DENSE, "huggingface"), DENSE)
    names = {
        name: dense[f"layers.0.feed_forward.{name}.weight"].source_name
        for name in ("w1", "w2", "w3")
    }
    assert names == {
        "w1": "model.layers.0.mlp.gate_proj.weight",
        "w2": "model.layers.0.mlp.down_proj.weight",
        "w3": "model.layers.0.mlp.up_proj.weight",
    }


@pytest.mark.parametrize("naming", NAMINGS)
def test_tied_output_is_the_bytes_of_the_embeddings(naming: Naming) -> None:
    tied = replace(DENSE, tie_embeddings=True)
    whole = stored(DENSE, naming)

    for given in (whole, without(whole, "lm_head.weight", "output.weight")):
        index = canonical_index(given, tied)
        assert index["output.weight"] == replace(
            index["tok_embeddings.weight"], name="output.weight"
        )


def test_an_untied_output_must_be_there() -> None:
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(lm_head\.weight\)"):
        canonical_index(without(stored(DENSE, "huggingface"), "lm_head.weight"), DENSE)


def test_ignores_rotary_frequencies_of_old_conversions() -> None:
    extra = StoredTensor(
        name="model.layers.0.self_attn.rotary_emb.inv_freq",
        file="weights",
        offset=0,
        dtype="fp32",
        shape=(8,),
    )

    assert len(canonical_index([*stored(DENSE, "huggingface"), extra], DENSE)) == 21


def test_lists_a_few_names_and_counts_the_rest() -> None:
    with pytest.raises(CheckpointError) as refused:
        canonical_index(stored(replace(MOE, num_experts=3), "mistral"), MOE)

    assert "6 tensors are missing (layers.0.feed_forward.experts.3.w1.weight, " in str(
        refused.value
    )
    assert "and 3 more)" in str(refused.value)
    assert (
        "2 shapes disagree (layers.0.feed_forward.gate.weight has (3, 64) and not (4, 64)"
        in str(refused.value)
    )


def test_refuses_layers_that_the_configuration_does_not_have() -> None:
    with pytest.raises(CheckpointError, match=r"9 tensors are unknown \(layers.1.attention_norm"):
        canonical_index(stored(DENSE, "mistral"), replace(DENSE, n_layers=1))


def test_refuses_a_tensor_in_two_files() -> None:
    given = stored(DENSE, "huggingface")

    with pytest.raises(CheckpointError, match=r"norm\.weight is in weights and again in other"):
        canonical_index([*given, replace(given[-2], file="other")], DENSE)


def test_refuses_names_of_another_family() -> None:
    with pytest.raises(
        CheckpointError, match=r"1 tensors \(transformer\.wte\.weight\) and neither"
    ):
        detect_naming(["transformer.wte.weight"])
    with pytest.raises(CheckpointError, match=r"0 tensors \(none\)"):
        detect_naming([])


def test_refuses_a_configuration_with_absurdly_many_tensors() -> None:
    with pytest.raises(ReleaseError, match="more than 200000 tensors"):
        canonical_index([], replace(MOE, n_layers=1024, num_experts=4096))


@draw(st.data())
def test_every_missing_or_renamed_tensor_is_an_error(data: st.DataObject) -> None:
    naming = data.draw(st.sampled_from(NAMINGS))
    given = stored(MOE, naming)
    victim = data.draw(st.integers(0, len(given) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                [],
                [replace(given[victim], name=given[victim].name + "x")],
                [replace(given[victim], shape=(*given[victim].shape, 1))],
            ]
        )
    )

    with pytest.raises(CheckpointError):
        canonical_index(given[:victim] + changed + given[victim + 1 :], MOE)


def fused(config: ModelConfig) -> list[StoredTensor]:
    """As the eight ``.pt`` parts hold it: all experts of a layer in one matrix per kind."""
    found: list[StoredTensor] = []
    for tensor in stored(config, "mistral"):
        name = tensor.name.replace("feed_forward", "block_sparse_moe")
        if ".experts." not in name:
            found.append(replace(tensor, name=name))
        elif ".experts.0." in name:
            rows = config.num_experts * config.hidden_dim
            part = name.replace(".experts.0", "").removesuffix(".weight")
            found.append(replace(tensor, name=part, shape=(rows, config.dim)))
    return found


def test_fused_experts_are_rows_of_one_matrix_and_w2_lies_transposed() -> None:
    given = fused(MOE)
    index = canonical_index(given, MOE)

    assert detect_naming(tensor.name for tensor in given) == "fused"
    assert [entry.name for entry in index] == [tensor.name for tensor in expected_tensors(MOE)]
    assert {entry.name for entry in index if entry.transposed} == {
        entry.name for entry in index if entry.name.endswith(".w2.weight")
    }
    stack = next(each for each in given if each.name == "layers.1.block_sparse_moe.w2")
    w2 = index["layers.1.feed_forward.experts.3.w2.weight"]
    assert w2.source_name == "layers.1.block_sparse_moe.w2[3]"
    assert (w2.shape, w2.num_bytes) == ((64, 96), 96 * 64 * 2)
    assert w2.offset == stack.offset + 3 * w2.num_bytes


@pytest.mark.parametrize(
    "shape", [(4 * 96, 65), (4 * 96 + 1, 64), (4 * 96,), (4, 96, 64), (0, 64), (64, 4 * 96)]
)
@pytest.mark.parametrize("part", ["w1", "w2"])
def test_refuses_a_stack_of_another_shape(part: str, shape: tuple[int, ...]) -> None:
    name = f"layers.0.block_sparse_moe.{part}"
    given = [replace(t, shape=shape) if t.name == name else t for t in fused(MOE)]

    with pytest.raises(CheckpointError):
        canonical_index(given, MOE)


def test_a_missing_or_repeated_stack_is_an_error() -> None:
    given = fused(MOE)
    lacking = without(given, "layers.0.block_sparse_moe.w3")

    with pytest.raises(CheckpointError, match=r"4 tensors are missing .*w3\[0\]"):
        canonical_index(lacking, MOE)
    stack = next(t for t in given if t.name.endswith(".w3"))
    with pytest.raises(CheckpointError, match="again in other"):
        canonical_index([*given, replace(stack, file="other")], MOE)
