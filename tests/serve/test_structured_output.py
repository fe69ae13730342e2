"""Which fields hold an answer to a grammar, and which grammars are refused."""

import json
from typing import Any

import pytest

from magnetar.serve.text.grammar import GrammarCompiler, GrammarSource
from magnetar.tests.api_server import MODEL, saying, serving

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["x"]}}}
BY_SCHEMA = GrammarSource(kind="json", text=json.dumps(SCHEMA))
BY_REGEX = GrammarSource(kind="regex", text="a+")
ANY_OBJECT = GrammarSource(kind="json", text='{"type":"object"}')
LARK = GrammarSource(kind="lark", text='start: "a"')


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[GrammarSource]:
    """What was compiled."""
    sources: list[GrammarSource] = []
    compile_it = GrammarCompiler.compile

    def record(self: GrammarCompiler, source: GrammarSource) -> object:
        sources.append(source)
        return compile_it(self, source)

    monkeypatch.setattr(GrammarCompiler, "compile", record)
    return sources


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            BY_SCHEMA,
        ),
        ({"guided_json": SCHEMA}, BY_SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, BY_SCHEMA),
        ({"guided_regex": "a+"}, BY_REGEX),
        ({"guided_grammar": LARK.text}, LARK),
        ({"guided_choice": ["a.", "b"]}, GrammarSource(kind="regex", text=r"a\.|b")),
        ({"structured_outputs": {"json": SCHEMA}}, BY_SCHEMA),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, BY_REGEX),
        ({"structured_outputs": {"grammar": LARK.text}}, LARK),
        ({"structured_outputs": {"choice": ["a"]}}, GrammarSource(kind="regex", text="a")),
    ],
)
def test_every_name_of_a_grammar_is_known(
    compiled: list[GrammarSource], fields: dict[str, Any], source: GrammarSource
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with serving(saying(" x"), chat_format="mistral-v1") as service:
        answers = [
            service.post("completions", {"prompt": "a", **fields}),
            service.post("chat/completions", {"messages": messages, "stream": True, **fields}),
        ]
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    assert compiled == [source, source]
    assert all(params.grammar is not None for _, params in service.engine.requests)


def test_plain_text_needs_no_grammar(compiled: list[GrammarSource]) -> None:
    with serving(saying(" x")) as service:
        service.openai.completions.create(
            model=MODEL, prompt="a", extra_body={"response_format": {"type": "text"}}
        )
    assert compiled == []
    assert service.engine.requests[0][1].grammar is None


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"guided_json": {"type": "nope"}}, "Invalid type: nope"),
        ({"guided_grammar": "start: x"}, "cannot be used"),
        ({"guided_json": nested(40)}, "nests more than 32"),
        ({"guided_regex": "(" * 40 + ")" * 40}, "nests more than 32"),
        ({"guided_regex": "a" * 70_000}, "more than 65536 bytes"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused(fields: dict[str, Any], complaint: str) -> None:
    with serving(saying(" x")) as service:
        answer = service.post("completions", {"prompt": "a", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_grammar"
    assert complaint in answer.json()["error"]["message"]
    assert service.engine.requests == []


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    over = threading.Event()
    monkeypatch.setattr("magnetar.serve.api.structured_output.COMPILE_S", 0.01)
    monkeypatch.setattr(GrammarCompiler, "compile", lambda *_: over.wait(20))
    with serving(saying(" x")) as service:
        answer = service.post("completions", {"prompt": "a", "guided_regex": "a"})
        over.set()
    assert answer.status_code == 400
    assert "took more than 0.01 s" in answer.json()["error"]["message"]
