"""A request whose numbers overflow fails by itself."""

import asyncio
from collections.abc import Sequence

import pytest

from magnetar.errors import NotFiniteError
from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.engine import Engine
from magnetar.serve.engine.request import GenerationParams
from magnetar.serve.engine.step import SamplingParams
from magnetar.tests.fake_stage import running_engine
from magnetar.tests.stages import GREEDY, MemorySource, Pipeline, random_tensors

CONFIG = ModelConfig(
    dim=64,
    n_layers=2,
    head_dim=32,
    hidden_dim=32,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=64,
    rope_theta=1e4,
    max_context_tokens=256,
    num_experts=4,
    num_experts_per_tok=2,
)
TIMEOUT_S = 20.0
BAD_TOKEN = 5
PLAIN = GenerationParams(
    sampling=SamplingParams(temperature=0.0, logit_bias=((BAD_TOKEN, -1000.0),)), max_tokens=6
)
WISHES = {
    "answer": PLAIN,
    "scores": GenerationParams(
        sampling=GREEDY, max_tokens=1, num_prompt_logprobs=1, reads_cache=False
    ),
    "vector": GenerationParams(sampling=GREEDY, max_tokens=1, pooling="mean", reads_cache=False),
}


def overflowing_source() -> MemorySource:
    """A model in which one token turns into infinities."""
    tensors = random_tensors(CONFIG)
    tensors["tok_embeddings.weight"][BAD_TOKEN, 3] = float("inf")
    return MemorySource(tensors)


async def answer(engine: Engine, prompt: Sequence[int], params: GenerationParams) -> list[int]:
    return [event.token_id async for event in engine.generate(prompt, params)]


@pytest.mark.parametrize("bounds", [(0, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_request_that_overflows_fails_and_the_others_go_on(
    bounds: tuple[int, ...], dtype: str
) -> None:
    good = [list(range(6, 30 + n)) for n in range(3)]
    bad = [7] * 20 + [BAD_TOKEN] + [8] * 9

    async def run(engine: Engine, *, with_bad: bool) -> list[object]:
        clients = [answer(engine, prompt, PLAIN) for prompt in good]
        if with_bad:
            clients += [answer(engine, bad, params) for params in WISHES.values()]
        async with asyncio.timeout(TIMEOUT_S):
            return list(await asyncio.gather(*clients, return_exceptions=True))

    stages = Pipeline(CONFIG, overflowing_source(), bounds=bounds, dtype=dtype).stages
    like_bad = Pipeline(CONFIG, overflowing_source(), dtype=dtype)
    fresh = like_bad.generate(0, [*bad[:20], 6, 6], 6, PLAIN.sampling)
    with running_engine(stages, num_kv_blocks=256, config=CONFIG) as (engine, _):
        alone = asyncio.run(run(engine, with_bad=False))
        together = asyncio.run(run(engine, with_bad=True))
        again = [asyncio.run(answer(engine, [*bad[:20], 6, 6], PLAIN))]
        assert engine.stats().kv_blocks_free == 256
    assert together[: len(good)] == alone
    # Nothing of what overflowed is left for those that begin alike.
    assert again == [fresh]
    assert all(isinstance(tokens, list) and len(tokens) == 6 for tokens in alone)
    assert [type(error) for error in together[len(good) :]] == [NotFiniteError] * len(WISHES)
