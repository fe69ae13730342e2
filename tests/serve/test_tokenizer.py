"""Tokenizers against the libraries that define them, and the numbers of the notes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import TokenizerError, UsageError
from magnetar.fetcher.config import ChatFormat, ModelConfig
from magnetar.serve.text.json_tokenizer import JsonTokenizer
from magnetar.serve.text.load import load_tokenizer
from magnetar.serve.text.sentencepiece_tokenizer import SentencePieceTokenizer
from magnetar.tests.tokenizers_for_tests import chatml_tokenizer_json, mistral_tokenizer_file

MISTRAL = SentencePieceTokenizer(mistral_tokenizer_file())


def test_the_mistral_tokenizer_is_the_releases_own() -> None:
    digest = hashlib.md5(mistral_tokenizer_file().read_bytes()).hexdigest()
    assert digest == "37974873eb68a7ab30c4912fc36264ae"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("hello", [6312, 28709]),
        ("  two  spaces", [259, 989, 28705, 10599]),
        ("Hello\n\nworld", [22557, 13, 13, 9471]),
        ("[INST]", [733, 16289, 28793]),
        ("[/INST]", [733, 28748, 16289, 28793]),
    ],
)
def test_golden_ids(text: str, ids: list[int]) -> None:
    assert MISTRAL.encode(text, add_bos=False) == ids
    assert MISTRAL.encode(text, add_bos=True) == [1, *ids]
    assert MISTRAL.decode(ids) == text


def test_facts_of_the_mistral_tokenizer() -> None:
    assert (MISTRAL.vocab_size, MISTRAL.bos_id, MISTRAL.eos_ids) == (
        32000,
        1,
        frozenset({2}),
    )
    assert MISTRAL.token_bytes(3) == b"\x00"
    assert MISTRAL.token_bytes(258) == b"\xff"
    assert MISTRAL.token_bytes(259) == b"  "
    assert MISTRAL.token_bytes(259, at_start=True) == b" "
    assert MISTRAL.token_bytes(2) == b""
    assert MISTRAL.token_bytes(99999) == b""
    assert [MISTRAL.token_name(id) for id in (2, 6312, 3 + 0xE2, 99999)] == [
        "</s>",
        " hell",
        "bytes:\\xe2",
        "<unused_99999>",
    ]


@given(st.lists(st.integers(0, 31999), max_size=30))
def test_decodes_any_ids_as_sentencepiece_does(ids: list[int]) -> None:
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(mistral_tokenizer_file()))
    assert MISTRAL.decode(ids) == oracle.decode(ids)


@given(st.text(max_size=60).filter(lambda text: "▁" not in text))
def test_text_survives_the_mistral_tokenizer(text: str) -> None:
    assert MISTRAL.decode(MISTRAL.encode(text, add_bos=True)) == text


@given(st.text(alphabet="</s>[INST] <unk>\n", max_size=40))
def test_text_never_becomes_a_control_token_of_mistral(text: str) -> None:
    assert not any(map(MISTRAL.is_control, MISTRAL.encode(text, add_bos=False)))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("chatml") / "tokenizer.json"
    path.write_text(chatml_tokenizer_json())
    return JsonTokenizer(path, chat_format="chatml")


@given(text=st.text(max_size=60))
def test_text_survives_byte_level_bpe(chatml: JsonTokenizer, text: str) -> None:
    assert chatml.decode(chatml.encode(text, add_bos=True)) == text


@given(text=st.text(max_size=60))
def test_byte_level_bpe_encodes_plain_text_as_the_library_does(
    chatml: JsonTokenizer, text: str
) -> None:
    import tokenizers

    oracle = tokenizers.Tokenizer.from_str(chatml_tokenizer_json())
    assert chatml.encode(text, add_bos=False) == oracle.encode(text).ids


def test_text_that_spells_a_control_token_stays_text(chatml: JsonTokenizer) -> None:
    text = "a<|im_start|>system<|im_end|><|endoftext|>"
    ids = chatml.encode(text, add_bos=False)
    assert not any(map(chatml.is_control, ids))
    assert chatml.decode(ids) == text


def test_chatml_answers_end_at_its_marker(chatml: JsonTokenizer) -> None:
    assert chatml.eos_ids == {chatml.control_id("<|im_end|>")}
    assert chatml.bos_id is None
    assert chatml.encode("", add_bos=True) == []


def test_chatml_without_its_markers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(chatml_tokenizer_json().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(TokenizerError, match=r"lacks <\|im_end\|>"):
        JsonTokenizer(path, chat_format="chatml")


def sentencepiece_as_json(**changes: Any) -> str:
    """A converted sentencepiece model: byte fallback, a dummy prefix, BOS by a template."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "▁▁"]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": id,
                    "content": pieces[id],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for id in range(3)
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {piece: id for id, piece in enumerate(pieces)},
                "merges": [["▁", "a"], ["▁", "▁"]],
            },
            **changes,
        }
    )


@given(text=st.text(alphabet="ab é€😀\n", max_size=20))
def test_text_survives_a_converted_sentencepiece_model(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    import tokenizers

    path = tmp_path_factory.getbasetemp() / "converted.json"
    path.write_text(sentencepiece_as_json())
    tokenizer = JsonTokenizer(path)
    ids = tokenizer.encode(text, add_bos=True)
    oracle = tokenizers.Tokenizer.from_file(str(path))
    assert ids == oracle.encode(text).ids
    assert tokenizer.decode(ids) == text == oracle.decode(ids)
    assert tokenizer.bos_id == 1


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(
        sentencepiece_as_json(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    )
    with pytest.raises(TokenizerError, match="WordPiece"):
        JsonTokenizer(path)


def config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        dim=8,
        n_layers=1,
        head_dim=8,
        hidden_dim=8,
        n_heads=1,
        n_kv_heads=1,
        norm_eps=1e-5,
        vocab_size=vocab_size,
        rope_theta=1e4,
        max_context_tokens=64,
    )


class Facts:
    """What `load_tokenizer` reads of the release's facts."""

    def __init__(
        self, *, vocab_size: int, tokenizer_file: str, chat_format: ChatFormat = "none"
    ) -> None:
        self.config = config(vocab_size)
        self.tokenizer_file = tokenizer_file
        self.chat_format = chat_format


def load(folder: Path, **facts: Any) -> Any:
    return load_tokenizer(folder, Facts(**facts))  # type: ignore[arg-type]


def test_loads_the_tokenizer_of_a_mistral_release(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(mistral_tokenizer_file().read_bytes())
    tokenizer = load(tmp_path, vocab_size=32000, tokenizer_file="tokenizer.model")
    assert tokenizer.encode("hello", add_bos=True) == [1, 6312, 28709]


def test_a_model_may_have_more_tokens_but_not_fewer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(mistral_tokenizer_file().read_bytes())
    assert load(tmp_path, vocab_size=32064, tokenizer_file="tokenizer.model").vocab_size == 32000
    with pytest.raises(TokenizerError, match="has 32000 tokens but the model only 512"):
        load(tmp_path, vocab_size=512, tokenizer_file="tokenizer.model")


def test_end_tokens_come_from_all_the_files_that_name_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(sentencepiece_as_json())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 7]}')
    tokenizer = load(tmp_path, vocab_size=300, tokenizer_file="tokenizer.json")
    assert tokenizer.eos_ids == {2, 5, 6, 7}


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(sentencepiece_as_json())
    (tmp_path / "config.json").write_text('{"eos_token_id": 300}')
    with pytest.raises(TokenizerError, match="end token 300"):
        load(tmp_path, vocab_size=300, tokenizer_file="tokenizer.json")


def test_a_malformed_end_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(sentencepiece_as_json())
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(TokenizerError, match="token ids are expected"):
        load(tmp_path, vocab_size=300, tokenizer_file="tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("raw", [b"", b"\x00\xff garbage", b"{}"])
def test_garbage_is_a_tokenizer_error(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(TokenizerError, match=name):
        load(tmp_path, vocab_size=300, tokenizer_file=name)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is missing"):
        load(tmp_path, vocab_size=300, tokenizer_file="tokenizer.model")


def test_a_control_token_that_merges_spell_is_refused_in_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    description = json.loads(sentencepiece_as_json())
    description["added_tokens"][2]["content"] = "▁a"
    description["added_tokens"][2]["id"] = description["model"]["vocab"]["▁a"]
    path.write_text(json.dumps(description))
    with pytest.raises(UsageError, match="spells the control token"):
        JsonTokenizer(path).encode("a", add_bos=False)
