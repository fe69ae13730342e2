"""SmolLM2's vocabulary as a tokenizer.json, against BPE written out and against transformers."""

import functools
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from magnetar.errors import TokenizerError
from magnetar.fetcher.demo.build import find_weights
from magnetar.fetcher.demo.byte_level_bpe import tokenizer_json
from magnetar.fetcher.demo.gguf_llama import LlamaGGUF

GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
TEXTS = [
    "What is the capital of France?",
    "  two  spaces, and\ttabs\n\n  and lines\r\n",
    "It's 12345.67 dollars; they'll've 3½ of ４ and Ⅻ",
    "def add(a, b):\n    return a + b  # comment",
    "Grüße aus Zürich, naïve café, 東京タワー 🗼🇫🇷",
    "<b>HTML</b> and <|not_a_token|>",
    "a1b22c333",
    "",
]


@dataclass(frozen=True)
class Vocabulary:
    """What the GGUF file says, and BPE as the paper has it."""

    tokens: list[str]
    merges: list[str]
    control_ids: list[int]

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {token: id for id, token in enumerate(self.tokens)}

    @functools.cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        pairs = [merge.split(" ") for merge in self.merges]
        return {(left, right): rank for rank, (left, right) in enumerate(pairs)}

    @functools.cached_property
    def letters(self) -> list[str]:
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in shown]
        return [chr(byte if byte in shown else 0x100 + hidden.index(byte)) for byte in range(256)]

    def encode(self, text: str) -> list[int]:
        """Digits alone, GPT-2's words between them, then the earliest merge again and again."""
        stretches = regex.findall(r"\p{N}|\P{N}+", text)
        words = [word for stretch in stretches for word in GPT2.findall(stretch)]
        return [id for word in words for id in self._merge(word)]

    def _merge(self, word: str) -> list[int]:
        pieces = [self.letters[byte] for byte in word.encode()]
        while ranked := [
            (self.ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in self.ranks
        ]:
            at = min(ranked)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [self.ids[piece] for piece in pieces if piece in self.ids]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    gguf = LlamaGGUF(find_weights().gguf)
    return Vocabulary(gguf.tokens, gguf.merges, gguf.control_ids)


@pytest.fixture(scope="module")
def text(vocabulary: Vocabulary) -> str:
    return tokenizer_json(
        tokens=vocabulary.tokens,
        merges=vocabulary.merges,
        control_ids=vocabulary.control_ids,
        pre_tokenizer="smollm",
    )


@pytest.fixture(scope="module")
def tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_str(text)


def test_every_token_has_the_id_of_the_file(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    assert tokenizer.get_vocab() == vocabulary.ids
    assert tokenizer.get_vocab_size() == 49152


def test_control_tokens_have_the_ids_that_smollm2_was_trained_with(tokenizer: Tokenizer) -> None:
    chat = "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>"
    assert tokenizer.encode(chat).ids == [1, 4093, 198, 26843, 2, 198, 0]
    assert tokenizer.token_to_id("<repo_name>") == 3
    assert tokenizer.token_to_id("<empty_output>") == 16


@pytest.mark.parametrize("sample", TEXTS)
def test_texts_become_the_tokens_of_bpe_and_come_back(
    tokenizer: Tokenizer, vocabulary: Vocabulary, sample: str
) -> None:
    ids = tokenizer.encode(sample).ids
    assert ids == vocabulary.encode(sample)
    assert tokenizer.decode(ids, skip_special_tokens=False) == sample


# Characters of this Python's Unicode: the two libraries may know different ones beyond it.
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
def test_any_text_becomes_the_tokens_of_bpe(
    tokenizer: Tokenizer, vocabulary: Vocabulary, sample: str
) -> None:
    assert tokenizer.encode(sample).ids == vocabulary.encode(sample)


def test_transformers_reads_it_as_it_is_meant(
    text: str, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for sample in TEXTS:
        assert tokenizer.encode(sample) == vocabulary.encode(sample)
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, vocabulary.ids["a"], 2]


def test_unknown_splitting_rules_are_refused() -> None:
    with pytest.raises(TokenizerError, match="'llama-bpe'; known here: smollm"):
        tokenizer_json(tokens=["a"], merges=[], control_ids=[], pre_tokenizer="llama-bpe")


def test_tokens_that_are_there_twice_are_refused() -> None:
    with pytest.raises(TokenizerError, match="1 of 3 tokens are there twice"):
        tokenizer_json(tokens=["a", "b", "a"], merges=[], control_ids=[], pre_tokenizer="smollm")


def test_nothing_is_put_around_a_text(text: str) -> None:
    described = json.loads(text)
    assert described["post_processor"] is None
    assert described["normalizer"] is None
