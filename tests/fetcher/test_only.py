import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import UsageError
from magnetar.fetcher.only import Only, parse_only
from magnetar.fetcher.tensors import TensorEntry, TensorIndex

NAMES = (
    "tok_embeddings.weight",
    *(
        f"layers.{layer}.{part}.weight"
        for layer in range(12)
        for part in ("ffn_norm", *(f"feed_forward.experts.{expert}.w1" for expert in range(4)))
    ),
    "norm.weight",
    "output.weight",
)
INDEX = TensorIndex(
    {
        name: TensorEntry(name=name, source_name=name, file="w", offset=0, dtype="bf16", shape=(1,))
        for name in NAMES
    }
)


def names(text: str) -> list[str]:
    return [entry.name for entry in parse_only(text).tensors(INDEX)]


def test_layers_bring_all_their_tensors_and_the_ends_of_the_model() -> None:
    assert names("1") == [name for name in NAMES if name.startswith("layers.1.")]
    assert names("0,11")[0] == "tok_embeddings.weight"
    assert names("11")[-2:] == ["norm.weight", "output.weight"]
    assert names("0-11") == list(NAMES)


def test_experts_leave_the_others_of_the_layer_out() -> None:
    assert names("3/1,2") == [
        "layers.3.ffn_norm.weight",
        "layers.3.feed_forward.experts.1.w1.weight",
        "layers.3.feed_forward.experts.2.w1.weight",
    ]


@given(st.sets(st.integers(0, 9999), min_size=1), st.sets(st.integers(0, 63), min_size=1))
def test_reads_lists_and_ranges(layers: set[int], experts: set[int]) -> None:
    text = ",".join(map(str, layers)) + f"/{min(experts)}-{max(experts)}"

    assert parse_only(text) == Only(
        layers=frozenset(layers), experts=frozenset(range(min(experts), max(experts) + 1))
    )


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1//2", "1/", "1,,2", "99999", "٣"])
def test_refuses_other_forms(text: str) -> None:
    with pytest.raises(UsageError, match="for example 0-7"):
        parse_only(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "no layer 12: the model has 12 layers, from 0"),
        ("0/4", "no expert 4: the model has 4 experts"),
    ],
)
def test_refuses_what_the_model_does_not_have(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        names(text)
