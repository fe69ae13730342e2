"""The API over the real engine: real links, stages that compute something simple."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx

from magnetar.serve.engine.engine import Engine
from magnetar.tests.api_server import http_client, listening
from magnetar.tests.fake_stage import expected_tokens, fake_stages, running_engine

NUM_BLOCKS = 60


@contextmanager
def served(num_stages: int) -> Iterator[tuple[httpx.Client, Engine]]:
    """A client of an API over `num_stages` stages, and their engine."""
    stages = fake_stages(num_stages, num_kv_blocks=NUM_BLOCKS)
    with (
        running_engine(stages, num_kv_blocks=NUM_BLOCKS) as (engine, _),
        listening(engine, max_context_tokens=NUM_BLOCKS * 16) as server,
        http_client(server) as client,
    ):
        yield client, engine


def test_many_clients_at_once_get_their_own_tokens() -> None:
    prompts = [[start + 3, start + 4, *range(3, 40 + start)] for start in range(6)]

    def ask(client: httpx.Client, prompt: list[int]) -> list[list[int]]:
        body = {"prompt": prompt, "max_tokens": 24, "return_token_ids": True, "n": 2}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return [choice["token_ids"] for choice in answer.json()["choices"]]

    with served(3) as (client, engine), ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ask(client, prompt), prompts))
        assert engine.stats().kv_blocks_free == NUM_BLOCKS
        assert client.get("/readyz").status_code == 200
    assert answers == [[expected_tokens(prompt, 24)] * 2 for prompt in prompts]


def test_a_client_that_leaves_frees_its_blocks() -> None:
    with served(2) as (client, engine):
        body = {"prompt": [3, 4], "max_tokens": 900, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        deadline = time.monotonic() + 10
        while engine.stats().kv_blocks_free < NUM_BLOCKS:
            assert time.monotonic() < deadline, "the blocks are still taken"
            time.sleep(0.005)


def test_an_answer_that_no_cache_could_hold_is_refused_with_the_numbers() -> None:
    with served(1) as (client, _):
        body = {"prompt": [3] * 900, "max_tokens": 100}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert "960" in answer.json()["error"]["message"]


def test_a_prompt_that_was_asked_before_comes_from_the_cache_unless_salted() -> None:
    body = {"prompt": [5] * 100, "max_tokens": 3, "return_token_ids": True}
    cached, answers = [], []
    with served(2) as (client, engine):
        for salt in ({}, {}, {"cache_salt": "mine"}, {"cache_salt": "mine", "n": 2}):
            answer = client.post("/v1/completions", json=body | salt).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            answers.append(answer["choices"][0]["token_ids"])
        assert engine.stats().num_cache_hits == 96 * 3
    assert cached == [0, 96, 0, 96]
    assert answers == [expected_tokens([5] * 100, 3)] * 4
