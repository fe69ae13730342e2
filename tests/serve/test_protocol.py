"""Bodies of any shape are read or refused, and refused politely."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.api.errors import ApiError
from magnetar.serve.api.protocol import ChatBody, CompletionBody, GenerationBody, parse_body

ANY_JSON: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "tools", "user", "best_of"})


def fault(body: dict[str, Any], body_type: type[GenerationBody]) -> ApiError | None:
    try:
        parse_body(json.dumps(body).encode(), body_type)
    except ApiError as error:
        return error
    return None


@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=4))
def test_any_json_object_is_read_or_refused_with_a_reason(fields: dict[str, Any]) -> None:
    for body_type, least in (
        (CompletionBody, {"prompt": "a"}),
        (ChatBody, {"messages": [{"role": "user", "content": "a"}]}),
    ):
        if error := fault({**least, **fields}, body_type):
            assert error.status == 400
            assert len(error.message) > 10
            assert error.message.endswith(".")
            assert "function-" not in error.message, "no names of validators"


@given(ANY_JSON)
def test_any_message_is_read_or_refused_with_a_reason(message: Any) -> None:
    if error := fault({"messages": [message]}, ChatBody):
        assert (error.param or "").startswith("messages")


@given(st.binary(max_size=30))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(ApiError):
        parse_body(raw, CompletionBody)


def refusal(body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(json.dumps(body).encode(), ChatBody)
    return caught.value


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "two names"),
        ({"seed": 1, "random_seed": 2}, "random_seed", "two names"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": 5}, "logprobs", "valid boolean, not 5"),
        ({"temperature": -0.1}, "temperature", "not -0.1"),
        (
            {"stream_options": {"usage": True}, "stream": True},
            "stream_options.usage",
            "not a field",
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal({"messages": MESSAGES, **fields})
    assert error.param == param
    assert message in error.message


def test_several_faults_are_told_at_once() -> None:
    error = refusal({"messages": MESSAGES, "temperature": 9, "top_p": 9})
    assert "`temperature`" in error.message
    assert "`top_p`" in error.message


def test_two_names_of_one_value_may_agree() -> None:
    fields = {"max_tokens": 2, "max_completion_tokens": 2, "seed": 1, "random_seed": 1}
    raw = json.dumps({"messages": MESSAGES, **fields}).encode()
    assert parse_body(raw, ChatBody).max_tokens == 2
