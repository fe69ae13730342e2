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
SCHEMA = {
    "type": "object",
    "properties": {"ripe": {"type": "boolean"}},
    "required": ["ripe"],
    "additionalProperties": False,
}
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "fruit", "schema": SCHEMA, "strict": True},
}
QUESTION = {"role": "user", "content": "Which of the fruit in the bowl by the window is ripe?"}
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
        "response_format": JSON_SCHEMA,
    },
    "cache_salt": {"cache_salt": "mine", "max_tokens": 11},
    "priority": {"priority": -1, "max_tokens": 10},
}
CHAT_FEATURES: Mapping[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.9, "seed": 3},
    "random_seed": {"temperature": 0.9, "random_seed": 4},
    "n": {"temperature": 2.0, "seed": 3, "n": 3},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "json_object": {"max_tokens": 40, "response_format": {"type": "json_object"}},
    "json_schema": {"max_tokens": 60, "response_format": JSON_SCHEMA},
    "safe_prompt": {"safe_prompt": True},
    "system message": {"messages": [{"role": "system", "content": "Be brief."}, QUESTION]},
    "earlier turns": {
        "messages": [QUESTION, {"role": "assistant", "content": "The pear."}, QUESTION]
    },
    "prefix": {
        "messages": [QUESTION, {"role": "assistant", "content": "The plum", "prefix": True}]
    },
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
        listening(engine, chat_format="mistral-v1", max_context_tokens=256) as server,
        http_client(server) as client,
    ):
        yield client
        assert engine.stats().kv_blocks_free == NUM_KV_BLOCKS


def request(feature: str, wishes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The endpoint and the body."""
    if feature.startswith("embeddings"):
        return "/v1/embeddings", {"input": [PROMPT], **wishes}
    body = {"max_tokens": 12, "temperature": 0, "return_token_ids": True}
    if feature.startswith("chat"):
        return "/v1/chat/completions", {**body, "messages": [QUESTION], **wishes}
    return "/v1/completions", {**body, "prompt": PROMPT, **wishes}


def streamed(
    client: httpx.Client, feature: str, wishes: Mapping[str, Any]
) -> tuple[list[int], str, Any]:
    """Tokens, text and usage of an answer that comes in pieces."""
    endpoint, body = request(feature, wishes)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    token_ids, text, usage = list[int](), "", None
    with client.stream("POST", endpoint, json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                usage = event["usage"] or usage
                for choice in event["choices"]:
                    token_ids += choice["token_ids"]
                    text += text_of(choice)
    return token_ids, text, usage


def text_of(choice: Mapping[str, Any]) -> str:
    """What a choice, whole or a piece of one, says."""
    message = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
    return str(message["content"])


def ask(client: httpx.Client, feature: str, wishes: Mapping[str, Any]) -> Answer:
    """What the answer says, without its id and what was in the cache."""
    endpoint, body = request(feature, wishes)
    answer = client.post(endpoint, json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    if "data" in told:
        return told["data"]
    # Of a conversation what was made of it comes beside the choices.
    return [*told["choices"], *filter(None, [told.get("prompt_logprobs")])]


@functools.cache
def alone() -> tuple[Mapping[str, dict[str, Any]], Mapping[str, Answer]]:
    """All wishes, with those that need to know the plain answer, and what one stage says to each
    while it does nothing else."""
    with served(1) as client:
        (plain,) = ask(client, "plain", {})
        (chat,) = ask(client, "chat", {})
        wishes = {
            "plain": {},
            **FEATURES,
            # It begins within one token and ends within another.
            "stop": {"stop": [text_of(plain)[3:9]]},
            "stop_token_ids": {"stop_token_ids": [plain["token_ids"][5]]},
            "chat": {},
            **{f"chat: {name}": wish for name, wish in CHAT_FEATURES.items()},
            "chat: stop": {"stop": [text_of(chat)[3:9]]},
            "embeddings of the last token": {"pooling": "last"},
            "embeddings of the mean": {"pooling": "mean"},
        }
        return wishes, {name: ask(client, name, wish) for name, wish in wishes.items()}


def test_every_wish_is_seen_in_the_answer() -> None:
    wishes, answers = alone()
    plain, chat = answers["plain"], answers["chat"]
    assert wishes.keys() == answers.keys()
    for feature, answer in answers.items():
        assert (answer == plain) == (feature == "plain"), feature
        assert (answer == chat) == (feature == "chat"), feature
    assert plain[0]["finish_reason"] == "length"
    for ended in (
        "stop",
        "chat: stop",
        "stop_token_ids",
        "end token",
        "min_tokens",
        "guided_choice",
    ):
        assert answers[ended][0]["finish_reason"] == "stop", ended
    for stopped, whole in (("stop", plain), ("chat: stop", chat)):
        assert text_of(answers[stopped][0]) == text_of(whole[0])[:3]
    assert len(answers["chat: n"]) == 3
    assert len(answers["chat: top_logprobs"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3
    assert text_of(answers["chat: prefix"][0]).startswith("The plum")
    for answer in ("json_schema", "chat: json_schema"):
        assert json.loads(text_of(answers[answer][0])).keys() == {"ripe"}
    assert [len(answers[name][0]["token_ids"]) for name in ("ignore_eos", "min_tokens")] == [12, 6]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_answers_of_a_crowd_are_those_of_one_stage_alone(num_stages: int) -> None:
    wishes, expected = alone()
    with served(num_stages) as client, ThreadPoolExecutor(len(wishes)) as pool:
        answers = pool.map(lambda item: (item[0], ask(client, *item)), wishes.items())
        for feature, answer in answers:
            assert answer == expected[feature], feature
        for feature in ("plain", "stop", "temperature", "chat", "chat: stop", "chat: prefix"):
            (whole,) = expected[feature]
            token_ids, text, usage = streamed(client, feature, wishes[feature])
            assert (token_ids, text) == (whole["token_ids"], text_of(whole)), feature
            if not feature.startswith("chat"):
                assert usage["prompt_tokens"] == len(PROMPT), feature
            assert usage["completion_tokens"] == len(token_ids), feature
