"""Echoes and logprobs of completions, of the answer and of the prompt."""

from magnetar.tests.api_server import MODEL, saying, serving
from magnetar.tests.completions import HELLO, STREAM, ask


@STREAM
def test_echo_puts_the_prompt_before_each_answer(stream: bool) -> None:
    with serving(saying(" world")) as service:
        texts = ask(service, {"prompt": ["Hello", "a  b"], "echo": True}, stream=stream)
        [of_ids] = ask(service, {"prompt": [1, *HELLO], "echo": True}, stream=stream)
        [alone] = ask(service, {"prompt": "Hi", "echo": True, "max_tokens": 0}, stream=stream)
    assert [choice["text"] for choice in texts] == ["Hello world", "a  b world"]
    assert of_ids["text"] == "hello world"
    assert (alone["text"], alone["finish_reason"]) == ("Hi", "length")
    assert len(service.engine.requests) == 3


@STREAM
def test_logprobs_have_the_sampled_token_with_the_same_float(stream: bool) -> None:
    with serving(saying(" one two three")) as service:
        [choice] = ask(
            service, {"prompt": "a", "logprobs": 2, "stop": "three", "seed": 1}, stream=stream
        )
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [" one", " two", " three"]
    assert logprobs["token_logprobs"] == [-0.5, -1.5, -2.5]
    assert logprobs["text_offset"] == [0, 4, 8]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())


def test_logprobs_0_is_the_sampled_token_alone() -> None:
    with serving(saying(" one")) as service:
        [choice] = ask(service, {"prompt": "a", "logprobs": 0}, stream=False)
    assert choice["logprobs"]["top_logprobs"][0] == {" one": -0.5}


@STREAM
def test_an_echoed_prompt_has_logprobs_too(stream: bool) -> None:
    """As lm-eval asks for the likelihood of a text."""
    body = {"prompt": [[1, *HELLO]], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    with serving(saying(" one two")) as service:
        [choice] = ask(service, body, stream=stream)
        [alone] = ask(service, {**body, "max_tokens": 0, "logprobs": 2}, stream=stream)
        [plain] = ask(service, {**body, "logprobs": None}, stream=stream)
    assert choice["text"] == "hello one"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", " hell", "o", " one"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [
        None,
        {" hell": -0.25, " pool": -0.125},
        {"o": -0.5, "i": -0.25},
        {" one": -0.5},
    ]
    assert logprobs["text_offset"] == [0, 0, 4, 5]
    assert (alone["text"], alone["finish_reason"]) == ("hello", "length")
    assert alone["logprobs"]["token_logprobs"] == [None, -0.25, -0.5]
    assert [len(top) for top in alone["logprobs"]["top_logprobs"][1:]] == [2, 2]
    assert plain["logprobs"] is None
    asked = [
        (params.max_tokens, params.num_prompt_logprobs, params.reads_cache)
        for _, params in service.engine.requests
    ]
    assert asked == [(1, 1, False), (1, 2, False), (1, None, True)]


def test_an_echo_alone_counts_no_token_of_an_answer() -> None:
    with serving(saying(" one")) as service:
        answer = service.openai.completions.create(
            model=MODEL, prompt=[1, *HELLO], max_tokens=0, echo=True, logprobs=1
        )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [None, -0.25, -0.5]


def test_prompt_logprobs_come_by_token_id() -> None:
    with serving(saying(" one")) as service:
        answer = service.post("completions", {"prompt": [1, *HELLO], "prompt_logprobs": 1}).json()
        streamed = service.post(
            "completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True}
        )
    [choice] = answer["choices"]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "6312": {"logprob": -0.25, "rank": 2, "decoded_token": " hell"},
            "6313": {"logprob": -0.125, "rank": 1, "decoded_token": " pool"},
        },
        {
            "28709": {"logprob": -0.5, "rank": 2, "decoded_token": "o"},
            "28710": {"logprob": -0.25, "rank": 1, "decoded_token": "i"},
        },
    ]
    assert streamed.status_code == 400
    assert streamed.json()["error"]["param"] == "prompt_logprobs"
