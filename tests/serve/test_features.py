"""Whatever a request may ask for, it gets the same from 1, 2 and 3 stages, alone or in a crowd."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from magnetar.fetcher.config import ModelConfig
from magnetar.tests.api_server import EOS, MISTRAL, http_client, listening
from magnetar.tests.fake_stage import running_engine
from magnetar.tests.stages import MemorySource, Pipeline, random_tensors

CONFIG = ModelConfig(
    dim=32,
    n_layers=3,
    head_dim=16,
    hidden_dim=32,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=32000,
    rope_theta=1e4,
    max_context_tokens=256,
    num_experts=4,
    num_experts_per_tok=2,
)
NUM_KV_BLOCKS = 40
"""So few that some of the crowd must wait."""
PROMPT = [1, *range(300, 340), *range(300, 320)]
CHOSEN = 29871
SCHEMA = {"type": "object", "properties": {"ripe": {"type": "boolean"}}, "required": ["ripe"]}
Answer = Any

FEATURES: Mapping[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.9, "seed": 3},
    "another seed": {"temperature": 0.9, "seed": 4},
    "top_p": {"temperature": 2.0, "seed": 3, "top_p": 0.5},
    "top_k": {"temperature": 2.0, "seed": 3, "top_k": 5},
    "min_p": {"temperature": 2.0, "seed": 3, "min_p": 0.2},
    "n": {"temperature": 2.0, "seed": 3, "n": 3},
    "repetition_penalty": {"repetition_penalty": 50.0, "max_tokens": 30},
    "presence_penalty": {"presence_penalty": 2.0, "max_tokens": 30},
    "frequency_penalty": {"frequency_penalty": 2.0, "max_tokens": 30},
    "logit_bias": {"logit_bias": {str(CHOSEN): 100}},
    "end token": {"logit_bias": {str(EOS): 100}},
    "ignore_eos": {"logit_bias": {str(EOS): 100}, "ignore_eos": True},
    "min_tokens": {"logit_bias": {str(EOS): 100}, "min_tokens": 5},
    "logprobs": {"logprobs": 3},
    "echo": {"logprobs": 2, "echo": True},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "guided_regex": {"guided_regex": "[a-f]{3,9}"},
    "guided_choice": {"guided_choice": ["small", "large"], "temperature": 1.0, "seed": 2},
    "guided_grammar": {"guided_grammar": 'start: "ripe" | "green" " "? "fruit"'},
    "json_object": {"max_tokens": 40, "response_format": {"type": "json_object"}},
    "json_schema": {
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "fruit", "schema": SCHEMA, "strict": True},
        },
    },
    "cache_salt": {"cache_salt": "mine", "max_tokens": 11},
    "priority": {"priority": -1, "max_tokens": 10},
}


@contextmanager
def served(num_stages: int) -> Iterator[httpx.Client]:
    """A client of a small random model in reproducible mode."""
    stages = Pipeline(
        CONFIG,
        MemorySource(random_tensors(CONFIG)),
        bounds=(0, *range(1, num_stages), CONFIG.n_layers),
        num_kv_blocks=64,
        batch_invariant=True,
    ).stages
    with (
        running_engine(
            stages, num_kv_blocks=NUM_KV_BLOCKS, config=CONFIG, eos_token_ids=MISTRAL.eos_ids
        ) as (engine, _),
        listening(engine, max_context_tokens=256) as server,
        http_client(server) as client,
    ):
        yield client
        assert engine.stats().kv_blocks_free == NUM_KV_BLOCKS


def streamed(client: httpx.Client, wish: Mapping[str, Any]) -> tuple[list[int], str, Any]:
    """Tokens, text and usage of an answer that comes in pieces."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}, **wish}
    token_ids, text, usage = list[int](), "", None
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    token_ids += choice["token_ids"]
                    text += choice["text"]
    return token_ids, text, usage


def ask(client: httpx.Client, feature: str, wishes: Mapping[str, Any]) -> Answer:
    """What the answer says, without its id and what was in the cache."""
    if feature.startswith("embeddings"):
        answer = client.post("/v1/embeddings", json={"input": [PROMPT], **wishes})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    answer = client.post("/v1/completions", json={**body, **wishes})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@functools.cache
def alone() -> tuple[Mapping[str, dict[str, Any]], Mapping[str, Answer]]:
    """All wishes, with those that need to know the plain answer, and what one stage says to each
    while it does nothing else."""
    with served(1) as client:
        (plain,) = ask(client, "plain", {})
        # It begins within one token and ends within another.
        stop = plain["text"][3:9]
        wishes = {
            "plain": {},
            **FEATURES,
            "stop": {"stop": [stop]},
            "stop_token_ids": {"stop_token_ids": [plain["token_ids"][5]]},
            "embeddings of the last token": {"pooling": "last"},
            "embeddings of the mean": {"pooling": "mean"},
        }
        return wishes, {name: ask(client, name, wish) for name, wish in wishes.items()}


def test_every_wish_is_seen_in_the_answer() -> None:
    wishes, answers = alone()
    plain = answers["plain"]
    assert wishes.keys() == answers.keys()
    for feature, answer in answers.items():
        assert answer == plain if feature == "plain" else answer != plain, feature
    assert plain[0]["finish_reason"] == "length"
    for ended in ("stop", "stop_token_ids", "end token", "min_tokens", "guided_choice"):
        assert answers[ended][0]["finish_reason"] == "stop", ended
    assert answers["stop"][0]["text"] == plain[0]["text"][:3]
    assert [len(answers[name][0]["token_ids"]) for name in ("ignore_eos", "min_tokens")] == [12, 6]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_answers_of_a_crowd_are_those_of_one_stage_alone(num_stages: int) -> None:
    wishes, expected = alone()
    with served(num_stages) as client, ThreadPoolExecutor(len(wishes)) as pool:
        answers = pool.map(lambda item: (item[0], ask(client, *item)), wishes.items())
        for feature, answer in answers:
            assert answer == expected[feature], feature
        for feature in ("plain", "stop", "temperature"):
            (whole,) = expected[feature]
            token_ids, text, usage = streamed(client, wishes[feature])
            assert (token_ids, text) == (whole["token_ids"], whole["text"]), feature
            assert usage["prompt_tokens"] == len(PROMPT), feature
            assert usage["completion_tokens"] == len(token_ids), feature
