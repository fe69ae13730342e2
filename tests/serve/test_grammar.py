"""Grammars over the tokens of the real tokenizers: what may come next, and where it ends."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from magnetar.errors import UsageError
from magnetar.serve.text.grammar import GrammarCompiler, GrammarKind, GrammarSource
from magnetar.serve.text.json_tokenizer import JsonTokenizer
from magnetar.tests.api_server import EOS, MISTRAL
from magnetar.tests.tokenizers_for_tests import chatml_tokenizer_json

COMPILER = GrammarCompiler(MISTRAL)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["Zoë", "Al"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


def allowed_ids(mask: bytes) -> list[int]:
    return [i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1]


def any_answer(source: GrammarSource, seed: int, max_tokens: int = 200) -> str:
    """Some text of the grammar, by random allowed tokens."""
    matcher = COMPILER.compile(source).start()
    random, ids = Random(seed), list[int]()
    while len(ids) < max_tokens:
        mask = matcher.allowed()
        assert matcher.allowed() == mask, "asking changes nothing"
        token_id = random.choice(allowed_ids(mask))
        matcher.accept(token_id)
        if token_id == EOS:
            return MISTRAL.decode(ids)
        ids.append(token_id)
    raise AssertionError("the answer does not end")


@pytest.mark.parametrize("seed", range(5))
def test_every_answer_keeps_to_a_schema(seed: int) -> None:
    answer = json.loads(any_answer(GrammarSource(kind="json", text=json.dumps(PERSON)), seed))
    assert answer["name"] in ("Zoë", "Al")
    assert answer["old"] in (True, False)


@pytest.mark.parametrize(
    ("kind", "text", "answers"),
    [
        ("regex", "[ab]{2}|é", {"aa", "ab", "ba", "bb", "é"}),
        ("lark", 'start: "x" rest?\nrest: "y" "z"', {"x", "xyz"}),
    ],
)
def test_every_answer_is_one_of_the_grammar(
    kind: GrammarKind, text: str, answers: set[str]
) -> None:
    found = {any_answer(GrammarSource(kind=kind, text=text), seed) for seed in range(40)}
    assert found == answers


def test_answers_of_one_grammar_go_their_own_ways() -> None:
    grammar = COMPILER.compile(GrammarSource(kind="regex", text="[ab]"))
    first, second = grammar.start(), grammar.start()
    begin = second.allowed()
    token_id = next(i for i in allowed_ids(begin) if MISTRAL.token_bytes(i) == b"a")
    first.accept(token_id)
    assert allowed_ids(first.allowed()) == [EOS]
    assert second.allowed() == begin


def test_after_the_end_only_the_end_may_come_again() -> None:
    matcher = COMPILER.compile(GrammarSource(kind="regex", text="a?")).start()
    for _ in range(3):
        assert EOS in allowed_ids(matcher.allowed())
        matcher.accept(EOS)
    assert allowed_ids(matcher.allowed()) == [EOS]


def test_a_token_that_is_not_allowed_ends_the_answer() -> None:
    matcher = COMPILER.compile(GrammarSource(kind="regex", text="aaa")).start()
    matcher.accept(MISTRAL.encode("b", add_bos=False)[-1])
    assert allowed_ids(matcher.allowed()) == [EOS]


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        ("regex", "(a", "unclosed group"),
        ("lark", 'start: "a', "lexer error"),
        ("json", '{"type": "nope"}', "Invalid type: nope"),
        ("json", '{"$ref": "http://example.com/x"}', "does not fetch"),
        ("regex", "a" * 70_000, "more than 65536 bytes"),
    ],
)
def test_what_is_no_grammar_is_refused(kind: GrammarKind, text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        COMPILER.compile(GrammarSource(kind=kind, text=text))


def test_every_end_token_of_a_model_may_end_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(chatml_tokenizer_json())
    tokenizer = JsonTokenizer(path, eos_ids=frozenset({0}), chat_format="chatml")
    assert len(tokenizer.eos_ids) > 1
    matcher = GrammarCompiler(tokenizer).compile(GrammarSource(kind="regex", text="a?")).start()
    assert set(allowed_ids(matcher.allowed())) >= tokenizer.eos_ids
