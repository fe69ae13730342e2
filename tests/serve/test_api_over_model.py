"""The API over the real engine and real stages: what the last stage reads out reaches a client."""

import json
from collections.abc import Iterator

import pytest
import torch
from openai import OpenAI

from magnetar.tests.api_server import CONFIG, MISTRAL, MODEL, listening, openai_client
from magnetar.tests.fake_stage import running_engine
from magnetar.tests.stages import MemorySource, Pipeline, random_tensors

PROMPT = [1, *range(300, 340), *range(300, 320)]


@pytest.fixture(scope="module", params=[(0, 3), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def client(request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    """A client of a small random model in one, two and three stages."""
    stages = Pipeline(CONFIG, MemorySource(random_tensors(CONFIG)), bounds=request.param).stages
    with (
        running_engine(stages, num_kv_blocks=64, config=CONFIG, eos_token_ids=MISTRAL.eos_ids) as (
            engine,
            _,
        ),
        listening(engine, max_context_tokens=256) as server,
        openai_client(server) as client,
    ):
        yield client


def logits_of(token_ids: list[int]) -> torch.Tensor:
    """Of every token, by a pass of one token at a time."""
    pipeline = Pipeline(CONFIG, MemorySource(random_tensors(CONFIG)))
    return torch.cat([pipeline.logits(pipeline.row(0, [token])) for token in token_ids])


def test_the_likelihood_of_a_text_is_the_models(client: OpenAI) -> None:
    for _ in range(2):  # the second time the prompt is in the KV cache
        answer = client.completions.create(
            model=MODEL, prompt=[PROMPT], max_tokens=1, logprobs=1, echo=True, temperature=0
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(PROMPT) + 1
    assert logprobs.token_logprobs[:1] == [None]
    expected = logits_of(PROMPT).log_softmax(dim=-1)
    own = expected[torch.arange(len(PROMPT) - 1), PROMPT[1:]]
    assert logprobs.token_logprobs[1:-1] == pytest.approx(own.tolist(), abs=1e-4)
    best = [max(top.values()) for top in logprobs.top_logprobs[1:]]
    assert best == pytest.approx(expected.max(dim=-1).values.tolist(), abs=1e-4)
    assert best[-1] == logprobs.token_logprobs[-1], "the greedy token has the highest float itself"


def test_penalties_are_those_of_all_tokens_before(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        frequency_penalty=2,
        extra_body={"repetition_penalty": 3, "ignore_eos": True, "return_token_ids": True},
    )
    token_ids = answer.choices[0].model_dump()["token_ids"]
    logits = logits_of([*PROMPT, *token_ids])
    for index, token_id in enumerate(token_ids):
        adjusted = logits[len(PROMPT) - 1 + index].clone()
        seen = list({*PROMPT, *token_ids[:index]})
        adjusted[seen] = torch.where(adjusted[seen] > 0, adjusted[seen] / 3, adjusted[seen] * 3)
        for past in token_ids[:index]:
            adjusted[past] -= 2
        assert float(adjusted[token_id]) == pytest.approx(float(adjusted.max()), abs=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_of_length_1_and_those_of_one_stage(pooling: str, client: OpenAI) -> None:
    answer = client.embeddings.create(
        model=MODEL, input=[PROMPT, PROMPT[:9], PROMPT], extra_body={"pooling": pooling}
    )
    vectors = [torch.tensor(each.embedding) for each in answer.data]
    assert len(vectors[0]) == CONFIG.dim
    torch.testing.assert_close(vectors[0], vectors[2])
    torch.testing.assert_close(torch.stack(vectors).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(vectors[0], vector_of(PROMPT, pooling), atol=1e-4, rtol=1e-4)


def vector_of(token_ids: list[int], pooling: str) -> torch.Tensor:
    """From the logits: the output head is a matrix of 16 columns, so they tell the states."""
    head = random_tensors(CONFIG)["output.weight"]
    states = torch.linalg.lstsq(head, logits_of(token_ids).T).solution.T
    pooled = states[-1] if pooling == "last" else states.mean(dim=0)
    return torch.nn.functional.normalize(pooled, dim=0)


SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "ripe": {"type": "boolean"}},
    "required": ["size", "ripe"],
    "additionalProperties": False,
}


def test_a_model_of_random_numbers_keeps_to_a_schema(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=150,
        n=3,
        seed=1,
        extra_body={
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "fruit", "schema": SCHEMA, "strict": True},
            }
        },
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        fruit = json.loads(choice.text)
        assert fruit["size"] in ("small", "large")
        assert fruit["ripe"] in (True, False)
