import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import MagnetarError, ReleaseError, UsageError
from magnetar.fetcher.checkpoint.params import read_config, read_params
from magnetar.fetcher.config import ModelConfig, ReleaseHints
from magnetar.tests.published import MIXTRAL_8X7B

NOTHING = ReleaseHints()
MIXTRAL_PARAMS: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
MIXTRAL_FACTS = ReleaseHints(rope_theta=1e6, sliding_window="none", max_context_tokens=32768)
MIXTRAL_CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
DENSE_CONFIG = {
    name: value
    for name, value in MIXTRAL_CONFIG.items()
    if name not in ("num_experts_per_tok", "num_local_experts", "sliding_window")
}


def params(
    given: ReleaseHints = NOTHING, known: ReleaseHints = NOTHING, /, **changes: Any
) -> ModelConfig:
    raw = json.dumps({**MIXTRAL_PARAMS, **changes}).encode()
    return read_params(raw, given=given, known=known)


def config(
    given: ReleaseHints = NOTHING,
    known: ReleaseHints = NOTHING,
    /,
    *,
    base: dict[str, Any] = MIXTRAL_CONFIG,
    without: str = "",
    **changes: Any,
) -> ModelConfig:
    changed = {**base, **changes}
    changed.pop(without, None)
    return read_config(json.dumps(changed).encode(), given=given, known=known)


def test_reads_the_params_of_the_seed_release_with_what_the_catalogue_knows() -> None:
    assert params(NOTHING, MIXTRAL_FACTS) == MIXTRAL_8X7B


def test_a_longer_context_than_the_published_one_is_refused() -> None:
    given = ReleaseHints(max_context_tokens=40_000)
    with pytest.raises(UsageError, match="made for 32768; ask for that or less"):
        config(given)
    with pytest.raises(UsageError, match="made for 32768"):
        params(given, MIXTRAL_FACTS)
    assert config(ReleaseHints(max_context_tokens=4096)).max_context_tokens == 4096


def test_given_wins_over_the_file_and_the_file_over_the_catalogue() -> None:
    given = ReleaseHints(rope_theta=7.0)
    known = ReleaseHints(rope_theta=8.0, sliding_window=99, max_context_tokens=100)

    found = params(given, known, rope_theta=9.0, sliding_window=4096)

    assert (found.rope_theta, found.sliding_window, found.max_context_tokens) == (7.0, 4096, 100)
    assert config(given, known).rope_theta == 7.0
    assert config(NOTHING, known).rope_theta == 1e6
    assert config(ReleaseHints(sliding_window=8), known).sliding_window == 8
    assert config(ReleaseHints(max_context_tokens=64), known).max_context_tokens == 64


def test_a_window_can_be_said_to_be_none() -> None:
    assert params(NOTHING, MIXTRAL_FACTS, sliding_window=None).sliding_window is None
    given = ReleaseHints(sliding_window="none")
    assert params(given, MIXTRAL_FACTS, sliding_window=4096).sliding_window is None
    assert config(given, base=DENSE_CONFIG, model_type="mistral").sliding_window is None


def test_names_every_flag_that_is_needed() -> None:
    with pytest.raises(UsageError, match="give --rope-theta, --sliding-window, --max-context"):
        params()
    with pytest.raises(UsageError, match="give --sliding-window, --max-context "):
        params(rope_theta=1e6)
    with pytest.raises(UsageError, match="give --max-context "):
        params(ReleaseHints(rope_theta=1e4, sliding_window="none"))
    with pytest.raises(UsageError, match="give --max-context"):
        config(without="max_position_embeddings")


def test_reads_the_params_of_a_dense_release() -> None:
    found = params(NOTHING, MIXTRAL_FACTS, moe=None, sliding_window=4096)

    assert (found.is_moe, found.num_experts, found.num_experts_per_tok) == (False, 0, 0)
    assert found.sliding_window == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "has no dim"),
        ({"dim": "4096"}, 'dim "4096", which is not a positive integer'),
        ({"n_layers": 0}, "n_layers 0, which is not a positive integer"),
        ({"n_layers": True}, "n_layers true, which is not a positive integer"),
        ({"n_layers": 1e300}, "which is not a positive integer"),
        ({"n_layers": 10**9}, "n_layers is 1000000000, more than 1024"),
        ({"norm_eps": 0}, "norm_eps is 0"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"n_kv_heads": 5}, "32 heads do not share 5 KV heads evenly"),
        ({"head_dim": 127}, "heads of 127 have no rotary pairs"),
        ({"moe": {"num_experts": 8}}, r"has no moe\.num_experts_per_tok"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 9}}, "9 experts per token of 8"),
        ({"moe": {**MIXTRAL_PARAMS["moe"], "shared": 1}}, "moe fields that are not known.*shared"),
        ({"moe": [8, 2]}, "moe .*, which is not an object"),
        ({"sliding_window": [4096, 8192]}, "a sliding window for every layer"),
        ({"tied_embeddings": 1}, "which is not true or false"),
        ({"vision_encoder": {}}, "1 fields that are not known here .vision_encoder"),
        ({"use_biases": True}, "not known here .use_biases"),
    ],
)
def test_refuses_params_that_describe_another_kind_of_model(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ReleaseError, match=message):
        params(NOTHING, MIXTRAL_FACTS, **changes)


def test_accepts_fields_that_change_nothing() -> None:
    found = params(
        NOTHING,
        MIXTRAL_FACTS,
        lora=None,
        use_biases=False,
        model_type="transformer",
        max_batch_size=4,
    )

    assert found == MIXTRAL_8X7B


def test_reads_a_config_of_either_generation_of_transformers() -> None:
    assert config() == MIXTRAL_8X7B
    later: dict[str, Any] = {
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "head_dim": None,
    }
    assert config(without="rope_theta", **later) == MIXTRAL_8X7B


def test_knows_what_transformers_takes_where_a_config_is_silent() -> None:
    mistral = config(base=DENSE_CONFIG, model_type="mistral", without="rope_theta")
    assert (mistral.sliding_window, mistral.rope_theta) == (4096, 1e4)
    nulled = config(base=DENSE_CONFIG, model_type="mistral", sliding_window=None)
    assert nulled.sliding_window is None
    llama = config(base=DENSE_CONFIG, model_type="llama", without="num_key_value_heads")
    assert (llama.n_kv_heads, llama.sliding_window, llama.num_experts) == (32, None, 0)
    assert config(without="num_key_value_heads", num_attention_heads=64).n_kv_heads == 8
    assert config(without="sliding_window").sliding_window is None
    assert config(without="rope_theta").rope_theta == 1e6


def test_head_size_may_differ_from_the_even_share() -> None:
    assert config(head_dim=64).head_dim == 64
    with pytest.raises(ReleaseError, match="no head_dim, and 30 heads do not share 4096 evenly"):
        config(num_attention_heads=30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type qwen2; mixtral, mistral and llama are served"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu".*only "silu" is'),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling of type linear"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling of type llama3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling of type yarn"),
        ({"rope_parameters": {"factor": 2.0}}, "rope_parameters that are not known here .factor"),
        ({"rope_parameters": {"full": {"rope_theta": 1}}}, "not known here .full"),
        ({"rope_parameters": {"rope_theta": 5.0}}, r"more than one rope theta: \[5.0, 1000000.0\]"),
        ({"num_local_experts": None}, "has no num_local_experts"),
        ({"sliding_window": "4096"}, "which is not a positive integer"),
    ],
)
def test_refuses_configs_that_compute_something_else(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("MixtralConfig", {"num_key_value_heads": 2, "num_local_experts": 4}),
        ("MistralConfig", {"sliding_window": 16, "head_dim": 32, "num_key_value_heads": 1}),
        ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 4}),
        ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    ],
)
def test_agrees_with_transformers_on_its_own_files(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    import transformers

    theirs = getattr(transformers, kind)(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, **options
    )
    theirs.save_pretrained(tmp_path)

    ours = read_config((tmp_path / "config.json").read_bytes(), given=NOTHING, known=NOTHING)

    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.max_context_tokens == theirs.max_position_embeddings
    assert ours.head_dim == (theirs.head_dim or 16)
    assert ours.n_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.num_experts == getattr(theirs, "num_local_experts", 0)


VALUES: st.SearchStrategy[object] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just({})
)


@pytest.mark.parametrize(
    ("read", "base"), [(read_params, MIXTRAL_PARAMS), (read_config, MIXTRAL_CONFIG)]
)
@given(data=st.data())
def test_never_raises_anything_but_our_errors(
    read: Callable[..., ModelConfig], base: dict[str, Any], data: st.DataObject
) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(base)), VALUES, max_size=3))
    raw = json.dumps({**base, **changes}).encode()

    try:
        found = read(raw, given=NOTHING, known=MIXTRAL_FACTS)
    except MagnetarError:
        return
    assert found.n_heads % found.n_kv_heads == 0


RENAMED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def test_the_params_beside_eight_parts_have_the_names_of_a_config() -> None:
    config = read_params(json.dumps(RENAMED).encode(), given=NOTHING, known=MIXTRAL_FACTS)

    assert (config.dim, config.hidden_dim, config.n_layers) == (64, 96, 2)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (4, 2, 16)
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert (config.rope_theta, config.sliding_window) == (1e6, None)


@pytest.mark.parametrize(("written", "window"), [("4096", 4096), ("None", None), (None, None)])
def test_their_window_is_a_string_and_doubted_for_experts(
    written: str | None, window: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    raw = json.dumps(RENAMED | {"sliding_window": written}).encode()

    assert read_params(raw, given=NOTHING, known=MIXTRAL_FACTS).sliding_window == window
    assert ("--sliding-window none if this is Mixtral" in caplog.text) == (window is not None)
    caplog.clear()
    none = ReleaseHints(sliding_window="none")
    assert read_params(raw, given=none, known=MIXTRAL_FACTS).sliding_window is None
    assert not caplog.text


def test_errors_of_such_params_name_their_file() -> None:
    with pytest.raises(ReleaseError, match=r"params\.json has no num_attention_heads"):
        read_params(b'{"hidden_size": 64}', given=NOTHING, known=MIXTRAL_FACTS)
    with pytest.raises(ReleaseError, match=r"params\.json has hidden_act"):
        read_params(
            json.dumps(RENAMED | {"hidden_act": "gelu"}).encode(),
            given=NOTHING,
            known=MIXTRAL_FACTS,
        )
