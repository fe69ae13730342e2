"""Tokens without a model: /tokenize, /detokenize and /tokenizer_info."""

from collections.abc import Iterator
from typing import Any

import pytest

from magnetar.serve.text.chat import ChatMessage, encode_chat
from magnetar.tests.api_server import MISTRAL, MODEL, Service, saying, serving

HELLO = [6312, 28709]


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    with serving(saying(" x"), chat_format="mistral-v1", max_context_tokens=99) as service:
        yield service
    assert service.engine.requests == []


def test_a_text_becomes_tokens_with_or_without_bos(shared: Service) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "hello"}
    answer = shared.http.post("/tokenize", json=body).json()
    assert answer == {"count": 3, "max_model_len": 99, "tokens": [1, *HELLO]}
    body |= {"add_special_tokens": False, "return_token_strs": True}
    answer = shared.http.post("/tokenize", json=body).json()
    assert (answer["tokens"], answer["token_strs"]) == (HELLO, [" hell", "o"])


def test_a_conversation_becomes_the_tokens_that_the_model_would_get(shared: Service) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = shared.http.post("/tokenize", json={"messages": messages}).json()
    assert answer["tokens"] == encode_chat(
        [ChatMessage(role="user", content="Hi")], MISTRAL, "mistral-v1"
    )


def test_the_name_of_a_control_token_is_its_id_but_not_within_a_text(shared: Service) -> None:
    def ids(prompt: str) -> list[int]:
        body = {"prompt": prompt, "add_special_tokens": False}
        return list(shared.http.post("/tokenize", json=body).json()["tokens"])

    assert ids("</s>") == [2]
    assert ids("") == []
    assert not {1, 2} & set(ids("a </s>"))


def test_tokens_become_text_again(shared: Service) -> None:
    answer = shared.http.post("/detokenize", json={"tokens": [1, *HELLO, 2]})
    assert answer.json() == {"prompt": "hello"}


def test_the_tokenizer_tells_its_end_token(shared: Service) -> None:
    info = shared.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert (info["vocab_size"], info["model_max_length"]) == (32000, 99)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("tokenize", {"prompt": 5}, "prompt"),
        ("tokenize", {"prompt": "a", "promt": "b"}, "promt"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [32000]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("tokenize", {"model": "other", "prompt": "a"}, "model"),
    ],
)
def test_what_is_wrong_is_named(shared: Service, path: str, body: Any, param: str) -> None:
    answer = shared.http.post(f"/{path}", json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_a_base_model_has_no_conversations_and_a_key_guards_all() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with serving(saying(" x"), api_key="secret") as service:
        answer = service.http.post("/tokenize", json={"messages": messages})
        headers = {"Authorization": "Bearer wrong"}
        refused = [
            service.http.post(f"/{path}", json={}, headers=headers).status_code
            for path in ("tokenize", "detokenize", "v1/embeddings")
        ]
    assert answer.json()["error"]["code"] == "base_model"
    assert refused == [401] * 3
