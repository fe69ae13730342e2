"""/v1/completions through real clients."""

from collections.abc import Sequence

import pytest
from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient

from magnetar.serve.engine.request import GenerationParams
from magnetar.tests.api_server import EOS, MISTRAL, MODEL, saying, serving
from magnetar.tests.completions import HELLO, STREAM, ask, events_of
from magnetar.tests.fake_engine import FakeEngine


def test_the_openai_client_gets_a_completion() -> None:
    with serving(saying(" world")) as service:
        answer = service.openai.completions.create(model=MODEL, prompt="Hello", max_tokens=9)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (" world", "stop", 0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 2
    assert answer.usage.total_tokens == 4
    [(prompt_ids, params)] = service.engine.requests
    assert prompt_ids == (1, 22557)
    assert params.max_tokens == 9


def test_the_openai_client_streams_a_completion_with_usage() -> None:
    with serving(saying(" to the whole world")) as service:
        chunks = list(
            service.openai.completions.create(
                model=MODEL, prompt="Hello", stream=True, stream_options={"include_usage": True}
            )
        )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == " to the whole world"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def _stream_async(url: str) -> str:
    async with AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(trust_env=False),
    ) as client:
        stream = await client.completions.create(model=MODEL, prompt="Hello", stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])


def test_the_async_openai_client_streams_too() -> None:
    import asyncio

    with serving(saying(" world")) as service:
        assert asyncio.run(_stream_async(service.server.url)) == " world"


def test_sampling_parameters_reach_the_engine() -> None:
    with serving(saying(" world")) as service:
        service.post(
            "completions",
            {
                "prompt": "Hello",
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 40,
                "seed": 7,
                "stop_token_ids": [13],
                "ignore_eos": True,
                "priority": -3,
                "cache_salt": "mine",
                "max_tokens": 3,
                "logprobs": 2,
                "min_p": 0.1,
                "presence_penalty": 1,
                "frequency_penalty": -0.5,
                "repetition_penalty": 1.25,
                "logit_bias": {"5": -100, "31999": 0.5},
                "min_tokens": 2,
            },
        )
    [(_, params)] = service.engine.requests
    sampling = params.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.seed, sampling.num_logprobs) == (7, 2)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (3, 2, True)
    assert sampling.min_p == 0.1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -0.5)
    assert sampling.repetition_penalty == 1.25
    assert sampling.logit_bias == ((5, -100.0), (31999, 0.5))
    assert params.reads_cache
    assert (params.priority, params.cache_salt) == (-3, "mine")
    assert params.stop_token_ids == frozenset({13})


def test_without_a_seed_every_request_has_its_own() -> None:
    with serving(saying(" world")) as service:
        for _ in range(2):
            service.post("completions", {"prompt": "Hello", "top_k": -1})
    seeds = {params.sampling.seed for _, params in service.engine.requests}
    assert len(seeds) == 2
    assert {params.sampling.top_k for _, params in service.engine.requests} == {0}


def test_choices_of_one_seed_have_seeds_apart_and_the_first_has_it_itself() -> None:
    with serving(saying(" world")) as service:
        answer = service.post("completions", {"prompt": "Hello", "n": 8, "seed": -1}).json()
    seeds = [params.sampling.seed for _, params in service.engine.requests]
    assert len(set(seeds)) == 8
    assert seeds[0] == 2**63 - 1
    assert [choice["index"] for choice in answer["choices"]] == list(range(8))
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 16,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", [(1, *HELLO)]),
        (["hello", "a"], [(1, *HELLO), (1, 264)]),
        (HELLO, [tuple(HELLO)]),
        ([HELLO, [5]], [tuple(HELLO), (5,)]),
    ],
)
def test_a_prompt_has_four_forms(prompt: object, prompts: list[tuple[int, ...]]) -> None:
    with serving(saying(" world")) as service:
        answer = service.post("completions", {"prompt": prompt, "n": 2}).json()
    assert [ids for ids, _ in service.engine.requests] == [p for p in prompts for _ in range(2)]
    assert len(answer["choices"]) == 2 * len(prompts)


def test_a_text_prompt_can_do_without_bos() -> None:
    with serving(saying(" world")) as service:
        service.post("completions", {"prompt": "hello", "add_special_tokens": False})
    assert service.engine.requests[0][0] == tuple(HELLO)


def test_a_text_that_begins_has_no_leading_space_and_one_that_goes_on_keeps_it() -> None:
    engine = FakeEngine(reply=lambda prompt, params: [6312, EOS], eos_token_ids=frozenset({EOS}))
    with serving(engine) as service:
        begun = service.post("completions", {"prompt": [1]}).json()
        continued = service.post("completions", {"prompt": [1, 6312]}).json()
    assert begun["choices"][0]["text"] == "hell"
    assert continued["choices"][0]["text"] == " hell"


@STREAM
def test_token_ids_are_returned_when_asked_for(stream: bool) -> None:
    with serving(saying(" world")) as service:
        [choice] = ask(service, {"prompt": "hello", "return_token_ids": True}, stream=stream)
        [plain] = ask(service, {"prompt": "hello"}, stream=stream)
    assert choice["token_ids"] == [1526, EOS]
    assert choice["prompt_token_ids"] == [1, *HELLO]
    assert "token_ids" not in plain
    assert "prompt_token_ids" not in plain


@STREAM
def test_a_stop_string_across_token_borders_ends_the_text_before_it(stream: bool) -> None:
    with serving(saying(" one two three four")) as service:
        [choice] = ask(service, {"prompt": "zero", "stop": ["x", "wo thr"]}, stream=stream)
        assert (choice["text"], choice["finish_reason"]) == (" one t", "stop")
        [choice] = ask(service, {"prompt": "zero", "stop": "four!"}, stream=stream)
        assert (choice["text"], choice["finish_reason"]) == (" one two three four", "stop")
    # The engine is told to stop at once.
    assert service.engine.num_aborted == 1


@STREAM
def test_a_letter_of_several_tokens_arrives_whole(stream: bool) -> None:
    with serving(saying(" → 😀𒀀!")) as service:
        [choice] = ask(service, {"prompt": "a", "max_tokens": 40}, stream=stream)
    assert choice["text"] == " → 😀𒀀!"


@STREAM
def test_an_answer_cut_by_max_tokens_says_so(stream: bool) -> None:
    with serving(saying(" one two three")) as service:
        [choice] = ask(service, {"prompt": "zero", "max_tokens": 2}, stream=stream)
    assert (choice["text"], choice["finish_reason"]) == (" one two", "length")


@STREAM
def test_no_stop_string_ends_an_answer_before_min_tokens(stream: bool) -> None:
    with serving(saying(" one two one three")) as service:
        body = {"prompt": "a", "stop": "one", "min_tokens": 2}
        [choice] = ask(service, body, stream=stream)
    assert (choice["text"], choice["finish_reason"]) == (" one two ", "stop")


def test_continuous_usage_is_in_every_chunk() -> None:
    with serving(saying(" one two")) as service:
        options = {"continuous_usage_stats": True, "include_usage": True}
        body = {"prompt": "a", "stream": True, "stream_options": options}
        events = events_of(service.post("completions", body))
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


def test_a_stage_lost_before_the_first_token_is_a_503_even_for_a_stream() -> None:
    engine = saying(" one two")
    engine.fail_after = 0
    with serving(engine) as service:
        for stream in (False, True):
            answer = service.post("completions", {"prompt": "a", "stream": stream})
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "5"
            assert answer.json()["error"]["code"] == "stage_lost"


def test_a_stage_lost_later_is_an_event_that_the_openai_client_raises() -> None:
    engine = saying(" one two three")
    engine.fail_after = 2
    with serving(engine) as service:
        events = events_of(service.post("completions", {"prompt": "a", "stream": True}))
        stream = service.openai.completions.create(model=MODEL, prompt="a", stream=True)
        texts: list[str] = []
        with pytest.raises(APIError, match="stage 1 on host b is gone"):
            texts.extend(chunk.choices[0].text for chunk in stream)
    assert texts == [" one", " two"]
    assert [event["choices"][0]["text"] for event in events[:-1]] == [" one", " two"]
    assert events[-1]["error"]["type"] == "service_unavailable_error"


def test_an_engine_that_gives_up_is_an_error_and_no_short_answer() -> None:
    engine = saying(" one two three")
    engine.abort_after = 1
    with serving(engine) as service:
        assert service.post("completions", {"prompt": "a"}).status_code == 503
        events = events_of(service.post("completions", {"prompt": "a", "stream": True}))
    assert "error" in events[-1]


def test_one_failed_choice_ends_the_others() -> None:
    def reply(prompt: Sequence[int], params: GenerationParams) -> list[int]:
        if params.sampling.seed != 5:
            raise RuntimeError("a bug with secret details")
        return [6312] * 500

    with serving(FakeEngine(reply=reply)) as service:
        answer = service.post("completions", {"prompt": "a", "n": 3, "seed": 5, "max_tokens": 400})
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_a_long_text_is_encoded_as_a_short_one() -> None:
    text = "The quick brown fox. " * 1000
    with serving(saying(" world"), max_context_tokens=32768) as service:
        assert service.post("completions", {"prompt": text}).status_code == 200
    assert list(service.engine.requests[0][0]) == MISTRAL.encode(text, add_bos=True)


def test_ids_of_the_tokenizer_only() -> None:
    with serving(saying(" world")) as service:
        answer = service.post("completions", {"prompt": [1, 32000]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert "32000 is not in the vocabulary of 32000" in answer.json()["error"]["message"]


def test_answers_are_the_decoded_tokens() -> None:
    ids = [6312, 13, 28705, 28705, 3 + 0xC3, 3 + 0xA9, 0, 6312]
    engine = FakeEngine(reply=lambda prompt, params: [*ids, EOS], eos_token_ids=frozenset({EOS}))
    with serving(engine) as service:
        [whole] = ask(service, {"prompt": [1]}, stream=False)
        [parts] = ask(service, {"prompt": [1]}, stream=True)
    assert whole["text"] == parts["text"] == MISTRAL.decode(ids)
