"""/v1/embeddings through the openai client."""

import base64
import struct
from typing import Any

import pytest

from magnetar.tests.api_server import MODEL, saying, serving

HELLO = [6312, 28709]


def test_the_openai_client_gets_a_vector_for_each_text() -> None:
    with serving(saying(" x")) as service:
        answer = service.openai.embeddings.create(model=MODEL, input=["hello", "a"])
        again = service.openai.embeddings.create(
            model=MODEL, input=HELLO, encoding_format="float", extra_body={"pooling": "mean"}
        )
    assert [each.index for each in answer.data] == [0, 1]
    assert answer.data[0].embedding == pytest.approx([0.6, 0.8])
    assert again.data[0].embedding == [0.6, 0.8]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (5, 5)
    asked = [(ids, p.pooling, p.max_tokens, p.reads_cache) for ids, p in service.engine.requests]
    assert asked == [
        ((1, *HELLO), "last", 1, False),
        ((1, 264), "last", 1, False),
        (tuple(HELLO), "mean", 1, False),
    ]


def test_base64_holds_little_endian_floats() -> None:
    with serving(saying(" x")) as service:
        answer = service.post("embeddings", {"input": "a", "encoding_format": "base64"}).json()
    raw = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<2f", raw) == pytest.approx((0.6, 0.8))
    assert answer["object"] == "list"
    assert answer["data"][0]["object"] == "embedding"


def test_many_inputs_keep_their_order_and_leave_room_in_the_queue() -> None:
    inputs = [[5 + index] for index in range(70)]
    with serving(saying(" x")) as service:
        answer = service.post("embeddings", {"input": inputs}).json()
    assert [each["index"] for each in answer["data"]] == list(range(70))
    assert len(service.engine.requests) == 70
    assert {ids[0] for ids, _ in service.engine.requests[:32]} == set(range(5, 37))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, None),
        ({"input": [32000]}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [5] * 512}, None),
    ],
)
def test_what_cannot_be_embedded_is_refused(fields: dict[str, Any], param: str | None) -> None:
    with serving(saying(" x")) as service:
        if fields["input"] == "":
            fields = {**fields, "add_special_tokens": False}
            param = "input"
        answer = service.post("embeddings", fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert service.engine.requests == []
