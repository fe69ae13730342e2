from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import ReleaseError
from magnetar.fetcher.layout import MAX_CONFIG_BYTES, select_files

MISTRAL = ("params.json", "tokenizer.model", "consolidated.00.pth")
HUGGINGFACE = ("config.json", "tokenizer.json", "model.safetensors")
SHARDS = tuple(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))


def listing(*names: str, root: str = "") -> dict[str, int]:
    return dict.fromkeys((root + name for name in names), 100)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (MISTRAL, "mistral-pth"),
        ((*MISTRAL[:2], "consolidated.safetensors"), "mistral-safetensors"),
        ((*MISTRAL[:2], "consolidated.00.pt", "consolidated.01.pt"), "mistral-pt"),
        (HUGGINGFACE, "huggingface"),
        (("config.json", "tokenizer.model", *SHARDS), "huggingface"),
    ],
)
@pytest.mark.parametrize("root", ["", "release/", "outer/inner/"])
def test_knows_the_layouts_at_any_depth(names: Any, kind: str, root: str) -> None:
    sizes = listing(*names, root=root) | {"README.md": 5, f"{root}extra.bin": 7}
    selection = select_files(sizes)
    assert (selection.kind, selection.root) == (kind, root)
    assert set(selection.wanted) == {root + name for name in names}
    assert set(selection.surplus) == {"README.md", f"{root}extra.bin"}


def test_takes_the_known_small_files_along() -> None:
    assert "RELEASE" in select_files(listing(*MISTRAL, "RELEASE")).wanted
    wanted = select_files(listing(*HUGGINGFACE, "chat_template.jinja", "vocab.json")).wanted
    assert "chat_template.jinja" in wanted
    assert "vocab.json" not in wanted


def test_takes_the_layout_that_says_more_of_two() -> None:
    selection = select_files(listing(*MISTRAL, *HUGGINGFACE))
    assert selection.kind == "huggingface"
    assert "consolidated.00.pth" in selection.surplus


def test_takes_the_layout_that_is_complete_of_two() -> None:
    assert select_files(listing(*MISTRAL, "config.json")).kind == "mistral-pth"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "missing files: params.json or config.json"),
        (("params.json", "consolidated.00.pth"), "missing files: tokenizer.model"),
        (("params.json", "consolidated.00.pth", "tekken.json"), "tekken"),
        (("params.json", "tokenizer.model"), "missing files: consolidated"),
        ((*MISTRAL, "consolidated.01.pth"), "split by tensor"),
        (("config.json", "tokenizer.json"), r"missing files: model\.safetensors"),
        (("config.json", "model.safetensors"), "missing files: tokenizer"),
        (("config.json", "tokenizer.json", *SHARDS[1:]), "model-00001-of-00003"),
        (("config.json", "tokenizer.json", *SHARDS, "model-00001-of-00002.safetensors"), "splits"),
        (("model.Q4_K_M.gguf",), r"GGUF \(quantised .* take the original release"),
        (("config.json", "tokenizer.json", "a-00001-of-00002.gguf"), "GGUF"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), r"PyTorch \.bin"),
        ((*MISTRAL[:2], "consolidated.02.pt"), r"missing files: consolidated\.00\.pt, .*01\.pt"),
    ],
)
def test_says_what_is_missing_or_cannot_be_read(names: Any, reason: str) -> None:
    with pytest.raises(ReleaseError, match=reason):
        select_files(listing(*names))


def test_refuses_several_releases() -> None:
    with pytest.raises(ReleaseError, match="several releases"):
        select_files(listing(*MISTRAL, root="a/") | listing(*MISTRAL, root="b/"))


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("params.json", MAX_CONFIG_BYTES + 1, "more than"),
        ("tokenizer.model", 1 << 30, "more than"),
        ("consolidated.00.pth", 0, "empty"),
    ],
)
def test_refuses_absurd_sizes(name: str, size: int, reason: str) -> None:
    with pytest.raises(ReleaseError, match=reason):
        select_files(listing(*MISTRAL) | {name: size})


@given(st.sets(st.sampled_from([*MISTRAL, *HUGGINGFACE, *SHARDS, "RELEASE", "x.gguf", "y"])))
def test_wanted_and_surplus_divide_the_listing(names: Any) -> None:
    try:
        selection = select_files(listing(*names))
    except ReleaseError:
        return
    assert set(selection.wanted) | set(selection.surplus) == names
    assert not set(selection.wanted) & set(selection.surplus)
    assert set(selection.weights) <= set(selection.wanted)
