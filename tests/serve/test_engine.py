"""The engine over real links and fake stages."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
from magnetar.errors import StageLostError, UsageError
from magnetar.serve.engine import Engine
from magnetar.serve.request import GenerationParams
from magnetar.tests.fake_stage import expected_tokens, fake_stages, running_engine

TIMEOUT_S = 20.0


async def answer(engine: Engine, prompt: Sequence[int], max_tokens: int) -> list[int]:
    events = engine.generate(prompt, GenerationParams(max_tokens=max_tokens))
    return [event.token_id async for event in events]


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_many_clients_at_once_get_their_own_tokens(num_stages: int) -> None:
    prompts = [list(range(start, start + 3 + 7 * start)) for start in range(9)]

    async def run(engine: Engine) -> list[list[int]]:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.gather(*(answer(engine, prompt, 30) for prompt in prompts))

    # 24 blocks do not hold all of them: some are preempted.
    with running_engine(fake_stages(num_stages, num_kv_blocks=24), num_kv_blocks=24) as (engine, _):
        answers = asyncio.run(run(engine))
    assert answers == [expected_tokens(prompt, 30) for prompt in prompts]


def test_a_client_that_leaves_frees_its_blocks() -> None:
    async def run(engine: Engine) -> None:
        events = engine.generate([1, 2], GenerationParams(max_tokens=1000))
        async for _ in events:
            break
        await events.aclose()
        await until_idle(engine)

    with running_engine(fake_stages(2, num_kv_blocks=100), num_kv_blocks=100) as (engine, _):
        asyncio.run(run(engine))
        assert engine.stats().kv_blocks_free == 100


def test_a_probe_goes_through_every_stage() -> None:
    stages = fake_stages(2, num_kv_blocks=4)
    stages[1].fail_at_step = 0
    with (
        running_engine(stages, num_kv_blocks=4) as (engine, _),
        pytest.raises(StageLostError, match="told to fail"),
    ):
        asyncio.run(engine.probe())


def test_a_probe_tells_the_seconds_of_a_step() -> None:
    with running_engine(fake_stages(2, num_kv_blocks=4), num_kv_blocks=4) as (engine, _):
        assert 0 < asyncio.run(engine.probe()) < TIMEOUT_S
        assert engine.stats().kv_blocks_free == 4


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_stage_fails_the_running_and_all_later_requests(lost: int) -> None:
    async def run(engine: Engine, stop: threading.Event) -> None:
        events = engine.generate([1, 2], GenerationParams(max_tokens=1000))
        async with asyncio.timeout(TIMEOUT_S):
            await anext(events)
            stop.set()
            with pytest.raises(StageLostError):
                async for _ in events:
                    pass
            with pytest.raises(StageLostError):
                await answer(engine, [1], 1)
            with pytest.raises(StageLostError):
                await engine.probe()

    stop = threading.Event()
    with running_engine(fake_stages(3, num_kv_blocks=100), num_kv_blocks=100) as (engine, workers):

        def kill() -> None:
            stop.wait(TIMEOUT_S)
            workers[lost].stop()

        killer = threading.Thread(target=kill)
        killer.start()
        asyncio.run(run(engine, stop))
        killer.join()
        assert engine.stats().running == 0


def test_a_request_that_cannot_fit_is_refused_with_the_numbers() -> None:
    with (
        running_engine(fake_stages(1, num_kv_blocks=2), num_kv_blocks=2) as (engine, _),
        pytest.raises(UsageError, match="1 tokens of prompt and 40 of answer"),
    ):
        asyncio.run(answer(engine, [1], 40))


def test_an_unknown_token_is_refused_before_it_reaches_a_stage() -> None:
    with (
        running_engine(fake_stages(1, num_kv_blocks=2), num_kv_blocks=2) as (engine, _),
        pytest.raises(UsageError, match="token 1000 is not in the vocabulary"),
    ):
        asyncio.run(answer(engine, [1000], 1))


def test_stopping_fails_what_runs_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())

    async def run(engine: Engine) -> None:
        events = engine.generate([1], GenerationParams(max_tokens=1000))
        await anext(events)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(StageLostError, match="stopping"):
            async for _ in events:
                pass

    with running_engine(fake_stages(2, num_kv_blocks=100), num_kv_blocks=100) as (engine, _):
        asyncio.run(run(engine))
    assert set(threading.enumerate()) == before
