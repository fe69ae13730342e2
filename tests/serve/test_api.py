"""Models, probes, and every way to be refused."""

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from magnetar.errors import StageLostError
from magnetar.serve.api.readiness import CACHE_S, NotReady, Readiness
from magnetar.tests.api_server import MODEL, Service, error_of, saying, serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Service]:
    """A server for the tests that only ask to be refused."""
    with serving(saying(" x")) as service:
        yield service


def test_models_are_listed_for_openais_and_mistrals_clients() -> None:
    with serving(saying(" x"), chat_format="mistral-v1", max_context_tokens=99) as service:
        [model] = service.openai.models.list().data
        one = service.openai.models.retrieve(MODEL)
        card = service.http.get("/v1/models").json()["data"][0]
        missing = service.http.get("/v1/models/none")
    assert (model.id, model.object, model.created) == (MODEL, "model", 1_702_000_000)
    assert one == model
    assert card["max_model_len"] == card["max_context_length"] == 99
    assert card["type"] == "base"
    assert card["capabilities"]["completion_chat"] is True
    assert error_of(missing, 404)["code"] == "model_not_found"


def test_a_base_model_is_listed_without_chat() -> None:
    with serving(saying(" x")) as service:
        card = service.http.get(f"/v1/models/{MODEL}").json()
    assert card["capabilities"]["completion_chat"] is False


def test_probes() -> None:
    with serving(saying(" x")) as service:
        assert service.http.get("/livez").json() == {"status": "ok"}
        for path in ("/readyz", "/health", "/readyz"):
            assert service.http.get(path).json() == {"status": "ok", "probe_s": 0.002}
    assert service.engine.num_probes == 1, "a probe is remembered for some seconds"


def test_a_lost_stage_makes_it_not_ready_but_alive() -> None:
    engine = saying(" x")
    engine.probe_error = StageLostError("stage 2 on host c is gone.")
    with serving(engine) as service:
        answer = service.http.get("/readyz")
        assert service.http.get("/livez").status_code == 200
    assert "stage 2 on host c is gone" in error_of(answer, 503)["message"]
    assert answer.headers["Retry-After"] == "5"


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magnetar.serve.api.readiness.PROBE_TIMEOUT_S", 0.05)
    engine = saying(" x")
    engine.probe_hangs = True
    with serving(engine) as service:
        assert "within 0.05 s" in error_of(service.http.get("/readyz"), 503)["message"]


def test_readiness_is_measured_again_when_it_is_old() -> None:
    engine = saying(" x")
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        readiness = Readiness(engine, clock=lambda: now)
        assert await readiness.check() == 0.002
        engine.probe_error = StageLostError("gone")
        assert await readiness.check() == 0.002
        now = CACHE_S
        with pytest.raises(NotReady, match="gone"):
            await readiness.check()
        engine.probe_error = None
        now = 2 * CACHE_S
        await asyncio.gather(*(readiness.check() for _ in range(5)))

    asyncio.run(scenario())
    assert engine.num_probes == 3


def test_unknown_paths_and_methods_answer_in_openais_shape() -> None:
    with serving(saying(" x")) as service:
        missing = error_of(service.http.get("/v1/embedding"), 404)
        assert missing["code"] == "unknown_url"
        assert "GET /v1/embedding" in missing["message"]
        wrong = service.http.get("/v1/completions")
        assert "does not take GET; use POST" in error_of(wrong, 405)["message"]
        assert wrong.headers["Allow"] == "POST"
        error_of(service.http.options("/v1/completions"), 405)


def test_another_model_is_not_found() -> None:
    with serving(saying(" x")) as service, pytest.raises(openai.NotFoundError) as caught:
        service.openai.completions.create(model="gpt-5", prompt="a")
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'{"prompt": NaN}', b"\xff", b'{"prompt": "\\ud800"}', b"[" * 9999]
)
def test_what_is_no_json_object_is_refused(shared: Service, raw: bytes) -> None:
    answer = shared.http.post("/v1/completions", content=raw)
    assert error_of(answer, 400)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("temperature", 3, "less than or equal to 2"),
        ("temperature", "hot", "valid number"),
        ("temperature", True, "valid number"),
        ("top_p", 0, "greater than 0"),
        ("top_k", -2, "greater than or equal to -1"),
        ("n", 9, "less than or equal to 8"),
        ("max_tokens", -1, "greater than or equal to 0"),
        ("max_tokens", 0, "needs `echo`"),
        ("max_tokens", "5", "valid integer"),
        ("seed", 2**63, "less than"),
        ("stream", "yes", "valid boolean"),
        ("stream_options", {"include_usage": True}, "needs `stream`"),
        ("logprobs", 21, "less than or equal to 20"),
        ("stop_token_ids", [32000], "not in the vocabulary"),
        ("min_p", 1.5, "less than or equal to 1"),
        ("presence_penalty", -3, "greater than or equal to -2"),
        ("frequency_penalty", 2.5, "less than or equal to 2"),
        ("repetition_penalty", 0, "greater than or equal to 0.01"),
        ("logit_bias", {"32000": 1}, "32000 is not in the vocabulary"),
        ("logit_bias", [5], "valid dictionary"),
        ("min_tokens", 17, "at least 17 tokens is asked for, and of at most 16"),
        ("prompt_logprobs", 21, "less than or equal to 20"),
        ("response_format", "xml", "object"),
        ("response_format", {"type": "json_schema"}, "belongs to the type"),
        ("guided_json", "{", "not valid JSON"),
        ("guided_choice", [], "at least 1"),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "give one"),
        ("prompt", {}, "a list of token ids"),
        ("prompt", [], "a list of token ids"),
        ("prompt", [[1], []], "a list of token ids"),
        ("prompt", [1, True], "a list of token ids"),
        ("prompt", ["a"] * 65, "at most 64"),
    ],
)
def test_a_value_out_of_range_is_named(
    shared: Service, field: str, value: object, complaint: str
) -> None:
    num_requests = len(shared.engine.requests)
    error = error_of(shared.post("completions", {"prompt": "a", field: value}), 400)
    assert error["param"] == field
    assert complaint in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(shared.engine.requests) == num_requests


def test_a_missing_field_is_named() -> None:
    with serving(saying(" x"), chat_format="mistral-v1") as service:
        assert error_of(service.post("completions", {}), 400)["param"] == "prompt"
        assert error_of(service.post("completions", {"prompt": None}), 400)["param"] == "prompt"
        assert error_of(service.post("chat/completions", {}), 400)["param"] == "messages"


@pytest.mark.parametrize(
    ("stop", "param"),
    [(["a"] * 17, "stop"), ([""], "stop[0]"), ("", "stop[0]"), (["a", "b" * 257], "stop[1]")],
)
def test_stop_strings_are_bounded(shared: Service, stop: object, param: str) -> None:
    error = error_of(shared.post("completions", {"prompt": "a", "stop": stop}), 400)
    assert error["param"] == param


def test_too_many_sequences_are_refused() -> None:
    with serving(saying(" x")) as service:
        body = {"prompt": ["a"] * 33, "n": 2}
        assert (
            "33 prompts times `n` of 2"
            in error_of(service.post("completions", body), 400)["message"]
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("best_of", 3),
        ("suffix", "end"),
        ("chat_template", "{{ messages }}"),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(
    shared: Service, field: str, value: object
) -> None:
    error = error_of(shared.post("completions", {"prompt": "a", field: value}), 400)
    assert error["param"] == field
    assert error["code"] == "unsupported"
    assert f"`{field}` is not supported" in error["message"]


def test_neutral_and_harmless_fields_are_accepted() -> None:
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "stop": None,
        "seed": None,
        "n": None,
    }
    with serving(saying(" x")) as service:
        assert service.post("completions", {"prompt": "a", **neutral}).status_code == 200


def test_an_unknown_field_is_named_with_what_was_meant() -> None:
    with serving(saying(" x")) as service:
        error = error_of(service.post("completions", {"prompt": "a", "temprature": 1}), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_field")
    assert "did you mean `temperature`" in error["message"]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "numbers"),
    [
        ([5] * 20, 1, "holds 16 tokens; the prompt has 20 and 1 more"),
        ([5] * 10, 7, "holds 16 tokens; the prompt has 10 and 7 more"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_the_numbers(
    prompt: list[int], max_tokens: int, numbers: str
) -> None:
    with serving(saying(" x"), max_context_tokens=16) as service:
        body = {"prompt": prompt, "max_tokens": max_tokens}
        error = error_of(service.post("completions", body), 400)
        fits = service.post("completions", {"prompt": [5] * 10, "max_tokens": 6})
    assert error["code"] == "context_length_exceeded"
    assert numbers in error["message"]
    assert fits.status_code == 200


def test_a_chat_that_fills_the_context_is_told_the_numbers() -> None:
    with serving(saying(" x"), chat_format="mistral-v1", max_context_tokens=9) as service:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        error = error_of(service.post("chat/completions", body), 400)
    assert "holds 9 tokens; the prompt has 9." in error["message"]


def test_a_body_over_the_limit_is_refused_announced_or_not() -> None:
    raw = json.dumps({"prompt": "a" * (2 * 2**20)}).encode()
    with serving(saying(" x")) as service:
        announced = service.http.post("/v1/completions", content=raw)
        chunked = service.http.post("/v1/completions", content=iter([raw[:9], raw[9:]]))
    for answer in (announced, chunked):
        assert error_of(answer, 413)["code"] == "body_too_large"


def test_a_full_queue_asks_to_come_back() -> None:
    engine = saying(" x")
    engine.queue_is_full = True
    with serving(engine) as service:
        for stream in (False, True):
            answer = service.post("completions", {"prompt": "a", "stream": stream})
            assert error_of(answer, 429)["code"] == "queue_full"
            assert int(answer.headers["Retry-After"]) > 0


def test_numbers_that_overflowed_are_told_as_such() -> None:
    engine = saying(" x")
    engine.overflows = True
    with serving(engine) as service:
        answer = service.post("completions", {"prompt": "a"})
    error = error_of(answer, 500)
    assert error["code"] == "not_finite"
    assert "overflowed" in error["message"]
