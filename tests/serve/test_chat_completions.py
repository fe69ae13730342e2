"""/v1/chat/completions through real clients."""

from typing import Any

import pytest

from magnetar.serve.text.chat import SAFETY_PROMPT, ChatMessage, encode_chat
from magnetar.serve.text.json_tokenizer import JsonTokenizer
from magnetar.tests.api_server import EOS, MISTRAL, MODEL, saying, serving
from magnetar.tests.fake_engine import FakeEngine
from magnetar.tests.tokenizers_for_tests import chatml_tokenizer_json

HI: Any = [{"role": "user", "content": "Hi"}]


def test_the_openai_client_chats() -> None:
    with serving(saying("Hello there", at_start=True), chat_format="mistral-v1") as service:
        answer = service.openai.chat.completions.create(
            model=MODEL, messages=HI, max_completion_tokens=9, seed=3
        )
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hello there"
    assert choice.finish_reason == "stop"
    [(prompt_ids, params)] = service.engine.requests
    assert prompt_ids == (1, 733, 16289, 28793, 15359, 733, 28748, 16289, 28793)
    assert (params.max_tokens, params.sampling.seed) == (9, 3)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 3)


def test_the_openai_client_streams_a_chat_with_usage() -> None:
    with serving(saying("Hello there", at_start=True), chat_format="mistral-v1") as service:
        chunks = list(
            service.openai.chat.completions.create(
                model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
            )
        )
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == "Hello there"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


def test_without_max_tokens_an_answer_may_fill_the_context() -> None:
    with serving(
        saying("Hello", at_start=True), chat_format="mistral-v1", max_context_tokens=64
    ) as service:
        service.post("chat/completions", {"messages": HI})
    assert service.engine.requests[0][1].max_tokens == 64 - 9


def test_the_end_token_is_not_part_of_the_text_but_of_the_ids() -> None:
    with serving(saying("Yes", at_start=True), chat_format="mistral-v1") as service:
        answer = service.post("chat/completions", {"messages": HI, "return_token_ids": True}).json()
    assert answer["choices"][0]["message"]["content"] == "Yes"
    assert answer["choices"][0]["token_ids"] == [5592, EOS]
    assert answer["prompt_token_ids"] == list(service.engine.requests[0][0])


def test_several_choices_stream_with_a_role_each() -> None:
    with serving(saying("Hello there", at_start=True), chat_format="mistral-v1") as service:
        chunks = service.openai.chat.completions.create(model=MODEL, messages=HI, stream=True, n=3)
        texts, roles = ["", "", ""], [0, 0, 0]
        for chunk in chunks:
            [choice] = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role is not None
    assert texts == ["Hello there"] * 3
    assert roles == [1, 1, 1]


def test_chat_logprobs_carry_bytes_and_alternatives() -> None:
    with serving(saying("é Yes", at_start=True), chat_format="mistral-v1") as service:
        answer = service.openai.chat.completions.create(
            model=MODEL, messages=HI, logprobs=True, top_logprobs=2, stop="Yes"
        )
        bare = service.openai.chat.completions.create(model=MODEL, messages=HI, logprobs=True)
    [choice] = answer.choices
    assert choice.message.content == "é "
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first = choice.logprobs.content[0]
    assert first.bytes is not None
    assert bytes(first.bytes).decode() == first.token
    assert [top.logprob for top in first.top_logprobs] == [first.logprob, first.logprob - 1]
    assert bare.choices[0].logprobs is not None
    assert bare.choices[0].logprobs.content is not None
    assert bare.choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_mistrals_prefix_is_continued_and_repeated(stream: bool) -> None:
    messages = [*HI, {"role": "assistant", "content": "Hello", "prefix": True}]
    with serving(saying(" there"), chat_format="mistral-v1") as service:
        body = {"messages": messages, "random_seed": 5}
        if stream:
            chunks = service.openai.chat.completions.create(
                model=MODEL, messages=messages, stream=True, extra_body={"random_seed": 5}
            )
            content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            answer = service.post("chat/completions", body).json()
            content = answer["choices"][0]["message"]["content"]
    assert content == "Hello there"
    [(prompt_ids, params)] = service.engine.requests
    assert prompt_ids[-1] == 22557
    assert params.sampling.seed == 5


@pytest.mark.parametrize("field", ["safe_prompt", "safe_mode"])
def test_mistrals_safe_prompt_comes_first(field: str) -> None:
    with serving(saying("Yes", at_start=True), chat_format="mistral-v1") as service:
        service.post("chat/completions", {"messages": HI, field: True})
    expected = encode_chat(
        [
            ChatMessage(role="system", content=SAFETY_PROMPT),
            ChatMessage(role="user", content="Hi"),
        ],
        MISTRAL,
        "mistral-v1",
    )
    assert list(service.engine.requests[0][0]) == expected


def test_content_may_be_text_parts_and_roles_may_be_developers() -> None:
    messages: Any = [
        {"role": "developer", "content": "SYS", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("Hi", "", "you")]},
        {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Bye"},
    ]
    with serving(saying("Yes", at_start=True), chat_format="mistral-v1") as service:
        answer = service.post("chat/completions", {"messages": messages, "user": "me"})
    assert answer.status_code == 200
    expected = encode_chat(
        [
            ChatMessage(role="system", content="SYS"),
            ChatMessage(role="user", content="Hi\n\nyou"),
            ChatMessage(role="assistant", content="Yes"),
            ChatMessage(role="user", content="Bye"),
        ],
        MISTRAL,
        "mistral-v1",
    )
    assert list(service.engine.requests[0][0]) == expected


def test_a_base_model_says_what_it_can_do_instead() -> None:
    with serving(saying(" world")) as service:
        answer = service.post("chat/completions", {"messages": HI})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "base_model"
    assert "is a base model" in error["message"]
    assert "/v1/completions" in error["message"]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0]"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "`tool_calls` is not supported"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prefix: true"),
        ([{"role": "user", "contents": "a"}], "did you mean `content`"),
    ],
)
def test_messages_that_make_no_sense_are_refused(messages: list[Any], complaint: str) -> None:
    with serving(saying("Yes", at_start=True), chat_format="mistral-v1") as service:
        answer = service.post("chat/completions", {"messages": messages})
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]


def test_chatml_models_stop_at_their_marker(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("chatml") / "tokenizer.json"
    path.write_text(chatml_tokenizer_json())
    tokenizer = JsonTokenizer(path, chat_format="chatml")
    ids = tokenizer.encode("hello world\n", add_bos=False)
    [end] = tokenizer.eos_ids
    engine = FakeEngine(reply=lambda prompt, params: [*ids, end], eos_token_ids=tokenizer.eos_ids)
    with serving(engine, chat_format="chatml", tokenizer=tokenizer) as service:
        answer = service.openai.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == "hello world\n"
    assert tokenizer.decode(list(engine.requests[0][0])) == "user\nHi\nassistant\n"


def test_penalties_bias_and_prompt_logprobs_through_the_openai_client() -> None:
    with serving(saying("Yes", at_start=True), chat_format="mistral-v1") as service:
        answer = service.openai.chat.completions.create(
            model=MODEL,
            messages=HI,
            presence_penalty=0.5,
            frequency_penalty=1.5,
            logit_bias={"5": 10},
            extra_body={"prompt_logprobs": 0, "min_p": 0.05, "repetition_penalty": 1.1},
        )
    sampling = service.engine.requests[0][1].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, 1.5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert sampling.logit_bias == ((5, 10.0),)
    scored: Any = answer.model_dump()["prompt_logprobs"]
    assert scored[0] is None
    assert [list(entry) for entry in scored[1:3]] == [["733"], ["16289"]]
