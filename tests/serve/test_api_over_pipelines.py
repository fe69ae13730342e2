"""The API over two pipelines of which one breaks in the middle: no client sees a difference."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import torch

from magnetar.serve.engine.router import Routed, Router
from magnetar.serve.engine.stage import Stage
from magnetar.serve.engine.step import StepPlan, StepResult
from magnetar.tests.api_server import CONFIG, MISTRAL, MODEL, http_client, listening
from magnetar.tests.fake_stage import running_engine
from magnetar.tests.stages import MemorySource, Pipeline, random_tensors

SCHEMA = {"type": "array", "items": {"type": "boolean"}, "minItems": 6, "maxItems": 10}
SAMPLED = {"model": MODEL, "stream": True, "temperature": 1.0, "logprobs": 2, "ignore_eos": True}
BODIES: tuple[dict[str, Any], ...] = (
    {**SAMPLED, "prompt": [1, *range(300, 340)], "seed": 1, "max_tokens": 28},
    {**SAMPLED, "prompt": [1, 300], "seed": 2, "max_tokens": 28, "n": 2},
    {
        **SAMPLED,
        "prompt": [1, *range(400, 420)],
        "seed": 3,
        "max_tokens": 28,
        "frequency_penalty": 1.5,
        "repetition_penalty": 2.0,
        "min_tokens": 20,
    },
    {
        **SAMPLED,
        "ignore_eos": False,
        "prompt": [1, *range(500, 520)],
        "seed": 4,
        "max_tokens": 70,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    },
)
NUM_ANSWERS = sum(body.get("n", 1) for body in BODIES)


class BreakingStage:
    """A stage that fails at a step."""

    def __init__(self, stage: Stage, fail_at_step: int | None) -> None:
        self._stage = stage
        self._fail_at_step = fail_at_step

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        if plan.step_id == self._fail_at_step:
            raise ValueError("the stage was told to fail")
        return self._stage.step(plan, hidden_TD)


@contextmanager
def pipelines(*failing_steps: int | None) -> Iterator[tuple[httpx.Client, Router]]:
    """A client of the model in as many pipelines of two stages, in reproducible mode."""
    source = MemorySource(random_tensors(CONFIG))
    with ExitStack() as stack:
        routed = []
        for fail_at_step in failing_steps:
            stages = Pipeline(CONFIG, source, bounds=(0, 1, 3), batch_invariant=True).stages
            engine, _ = stack.enter_context(
                running_engine(
                    [stages[0], BreakingStage(stages[1], fail_at_step)],
                    num_kv_blocks=64,
                    config=CONFIG,
                    eos_token_ids=MISTRAL.eos_ids,
                )
            )
            routed.append(Routed(engine=engine, speed=1.0, max_running=8))
        router = Router(routed)
        server = stack.enter_context(listening(router, max_context_tokens=256))
        yield stack.enter_context(http_client(server)), router


@contextmanager
def another(source: MemorySource) -> Iterator[Routed]:
    """A pipeline that does not fail, in the place of one that did."""
    stages = Pipeline(CONFIG, source, bounds=(0, 1, 3), batch_invariant=True).stages
    with running_engine(stages, num_kv_blocks=64, config=CONFIG, eos_token_ids=MISTRAL.eos_ids) as (
        engine,
        _,
    ):
        yield Routed(engine=engine, speed=1.0, max_running=8)


def choices(client: httpx.Client, body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Text, log-probabilities and end of each choice of a stream."""
    found: dict[int, dict[str, Any]] = {}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                told = found.setdefault(choice["index"], {"text": "", "logprobs": [], "end": None})
                told["text"] += choice["text"]
                if choice["logprobs"] is not None:
                    told["logprobs"] += choice["logprobs"]["token_logprobs"]
                told["end"] = choice["finish_reason"] or told["end"]
    return found


def all_at_once(client: httpx.Client, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: choices(client, body), bodies))


def test_streams_of_a_pipeline_that_breaks_are_those_of_one_that_does_not() -> None:
    with pipelines(None) as (client, _):
        expected = [choices(client, body) for body in BODIES]
        # A stop string that spans tokens, somewhere behind the break.
        stop = expected[0][0]["text"][-30:-24]
        stopping = {**BODIES[0], "stop": [stop]}
        expected.append(choices(client, stopping))
    assert expected[-1][0]["end"] == "stop"
    assert stop not in expected[-1][0]["text"]
    assert len(json.loads(expected[3][0]["text"])) >= 6

    with pipelines(8, None) as (client, router):
        answers = all_at_once(client, [*BODIES, stopping])
        page = client.get("/metrics").text
        assert client.get("/readyz").status_code == 200
        stats = router.stats()
    assert answers == expected
    assert stats.num_moved > 0
    assert f'magnetar:requests_moved_total{{model_name="{MODEL}"}} {stats.num_moved}' in page
    assert f'magnetar:pipeline_up{{model_name="{MODEL}",pipeline="0"}} 0' in page


def test_streams_of_the_only_pipeline_are_the_same_when_it_breaks_and_comes_back() -> None:
    with pipelines(None) as (client, _):
        expected = [choices(client, body) for body in BODIES]
    with (
        pipelines(8) as (client, router),
        another(MemorySource(random_tensors(CONFIG))) as back,
        ThreadPoolExecutor(1) as pool,
    ):
        assert client.get("/readyz").status_code == 200
        answering = pool.submit(all_at_once, client, BODIES)
        deadline = time.monotonic() + 60
        while not (router.stats().is_over and router.stats().waiting == NUM_ANSWERS):
            assert time.monotonic() < deadline, router.stats()
            time.sleep(0.01)
        refused = client.post("/v1/completions", json={"model": MODEL, "prompt": [1]})
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/readyz").status_code == 503
        router.replace(0, back)
        assert client.get("/readyz").status_code == 200
        assert answering.result(60) == expected
        page = client.get("/metrics").text
    labels = f'model_name="{MODEL}",pipeline="0"'
    assert f"magnetar:pipeline_restarts_total{{{labels}}} 1" in page


def test_embeddings_and_scored_prompts_come_from_whichever_pipeline_lives() -> None:
    scored = {"model": MODEL, "prompt": [1, 300, 301], "max_tokens": 1, "temperature": 0}
    scored |= {"echo": True, "logprobs": 1}
    embedded = {"model": MODEL, "input": [[1, 300 + n] for n in range(12)]}
    answers = []
    for failing in ((None,), (1, None)):
        with pipelines(*failing) as (client, router):
            vectors = client.post("/v1/embeddings", json=embedded).json()["data"]
            choice = client.post("/v1/completions", json=scored).json()["choices"][0]
            answers.append(([each["embedding"] for each in vectors], choice["logprobs"]))
            lives = [not each.is_over for each in router.stats().pipelines]
            assert lives == [each is None for each in failing]
    assert answers[0] == answers[1]
