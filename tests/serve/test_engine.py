"""The engine over real links and fake stages."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from magnetar.cluster.links import link
from magnetar.cluster.links.frame import Frame, pack_header
from magnetar.cluster.links.link import SILENCE_S, TcpLink
from magnetar.errors import QueueFullError, StageLostError, UsageError
from magnetar.serve.engine import engine as engine_module
from magnetar.serve.engine import stage_worker
from magnetar.serve.engine.engine import Engine
from magnetar.serve.engine.pipeline import STALL_S
from magnetar.serve.engine.request import GenerationParams
from magnetar.tests.fake_stage import (
    FakeStage,
    GatedStage,
    expected_tokens,
    fake_stages,
    linked_pair,
    model_config,
    running_engine,
)

TIMEOUT_S = 20.0


def bare_engine(*, clock: Callable[[], float] = time.monotonic) -> tuple[Engine, TcpLink, TcpLink]:
    """An engine, and the ends of its links that the first and the last stage would hold."""
    last, from_last = linked_pair()
    engine, first = bare_engine_behind(from_last, clock=clock)
    return engine, first, last


def bare_engine_behind(
    from_last: TcpLink, *, clock: Callable[[], float] = time.monotonic
) -> tuple[Engine, TcpLink]:
    """An engine with this link from the last stage, and the end that the first would hold."""
    to_first, first = linked_pair()
    engine = Engine(
        config=model_config(),
        num_kv_blocks=4,
        max_context_tokens=64,
        max_running=1,
        max_waiting=1,
        num_stages=1,
        downstream=to_first,
        upstream=from_last,
        eos_token_ids=(),
        clock=clock,
    )
    return engine, first


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


@pytest.mark.parametrize(("asked", "largest"), [(32, 32), (None, 200)])
def test_no_step_has_more_tokens_than_it_may(asked: int | None, largest: int) -> None:
    stages, prompt = fake_stages(2, num_kv_blocks=24), list(range(200))
    with running_engine(stages, num_kv_blocks=24, max_running=8, max_step_tokens=asked) as (
        engine,
        _,
    ):
        assert asyncio.run(answer(engine, prompt, 5)) == expected_tokens(prompt, 5)
    assert [stage.largest_step for stage in stages] == [largest, largest]


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


def test_a_probe_rides_along_when_every_block_is_taken() -> None:
    """A request of its own would wait for the one that has the only block."""

    async def run(engine: Engine) -> None:
        events = engine.generate([1], GenerationParams(max_tokens=16))
        await anext(events)
        async with asyncio.timeout(TIMEOUT_S):
            assert await engine.probe() > 0
            assert [event.token_id async for event in events] == expected_tokens([1], 16)[1:]

    with running_engine(fake_stages(2, num_kv_blocks=1), num_kv_blocks=1) as (engine, _):
        asyncio.run(run(engine))


class BusyStage(FakeStage):
    """Has one layer of three experts, one of which computes everything."""

    def expert_tokens(self) -> dict[int, tuple[int, ...]]:
        return {int(self._is_last): (0, 7, 0)}


def test_traffic_of_experts_of_all_stages_is_in_the_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_worker, "ALIVE_S", 0.01)
    stages = [
        BusyStage(num_kv_blocks=4, is_first=is_first, is_last=not is_first)
        for is_first in (True, False)
    ]

    async def until_told(engine: Engine) -> None:
        while len(engine.stats().expert_tokens) < 2:
            await asyncio.sleep(0.001)

    with running_engine(stages, num_kv_blocks=4) as (engine, _):
        asyncio.run(asyncio.wait_for(until_told(engine), TIMEOUT_S))
        assert engine.stats().expert_tokens == {0: (0, 7, 0), 1: (0, 7, 0)}


def test_a_probe_that_nobody_waits_for_harms_nothing() -> None:
    stage = GatedStage(num_kv_blocks=4, is_first=True, is_last=True)

    async def run(engine: Engine) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.probe(), 0.01)
        stage.gate.set()
        async with asyncio.timeout(TIMEOUT_S):
            assert await answer(engine, [1], 3) == expected_tokens([1], 3)
            assert await engine.probe() > 0

    with running_engine([stage], num_kv_blocks=4) as (engine, _):
        asyncio.run(run(engine))


def test_requests_beyond_the_queue_are_refused_and_the_others_served() -> None:
    max_waiting = 5
    stage = GatedStage(num_kv_blocks=1, is_first=True, is_last=True)

    async def run(engine: Engine) -> None:
        tasks = [asyncio.create_task(answer(engine, [1], 2)) for _ in range(max_waiting)]
        async with asyncio.timeout(TIMEOUT_S):
            while engine.stats().running == 0:
                await asyncio.sleep(0.001)
            assert engine.stats().waiting == max_waiting - 1
            tasks.append(asyncio.create_task(answer(engine, [1], 2)))
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match=f"{max_waiting} requests wait"):
                await answer(engine, [1], 2)
            stage.gate.set()
            assert await asyncio.gather(*tasks) == [expected_tokens([1], 2)] * (max_waiting + 1)

    with running_engine([stage], num_kv_blocks=1, max_waiting=max_waiting) as (engine, _):
        asyncio.run(run(engine))


def test_callers_in_several_event_loops_are_served() -> None:
    with running_engine(fake_stages(2, num_kv_blocks=30), num_kv_blocks=30) as (engine, _):

        def serve_one(start: int) -> list[int]:
            return asyncio.run(answer(engine, [start], 20))

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(serve_one, range(8)))
    assert answers == [expected_tokens([start], 20) for start in range(8)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_every_client_is_told_why_a_stage_failed(failing: int) -> None:
    """Whatever comes first: the reason around the ring, or the broken link to the first stage."""
    stages = fake_stages(3, num_kv_blocks=100)
    stages[failing].fail_at_step = 20

    async def run(engine: Engine) -> list[object]:
        clients = (answer(engine, [start], 200) for start in range(6))
        async with asyncio.timeout(TIMEOUT_S):
            return list(await asyncio.gather(*clients, return_exceptions=True))

    with running_engine(stages, num_kv_blocks=100) as (engine, _):
        outcomes = asyncio.run(run(engine))
        with pytest.raises(StageLostError, match="told to fail"):
            engine.wait(TIMEOUT_S)
    for outcome in outcomes:
        assert isinstance(outcome, StageLostError)
        assert "told to fail" in str(outcome)


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
        assert engine.wait(TIMEOUT_S)
        with pytest.raises(StageLostError, match="stopping"):
            asyncio.run(engine.probe())
        engine.stop()
    assert set(threading.enumerate()) == before


def test_a_ring_that_brings_nothing_back_is_lost() -> None:
    now = [0.0]
    engine, first, last = bare_engine(clock=lambda: now[0])
    engine.start()

    async def run() -> None:
        waiting = asyncio.create_task(answer(engine, [1], 1))
        await asyncio.to_thread(first.receive, TIMEOUT_S)
        now[0] = STALL_S + 1
        with pytest.raises(StageLostError, match="no step came back"):
            await waiting

    asyncio.run(run())
    engine.stop()
    first.close()
    last.close()


def test_a_last_stage_that_gives_no_sign_of_life_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "ALIVE_S", 0.01)
    monkeypatch.setattr(link, "SILENCE_S", 0.02)
    engine, first, last = bare_engine()
    engine.start()
    with pytest.raises(StageLostError, match="the last stage is silent"):
        engine.wait(TIMEOUT_S)
    engine.stop()
    first.close()
    last.close()


def test_an_answer_to_what_was_not_asked_ends_the_engine() -> None:
    engine, first, last = bare_engine()
    engine.start()
    last.send(Frame(kind="result", epoch=0, step_id=0, body=b"[]"))
    with pytest.raises(StageLostError, match="out of turn"):
        engine.wait(TIMEOUT_S)
    engine.stop()
    first.close()
    last.close()


def test_stopping_does_not_wait_for_the_rest_of_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STOP_S", 0.01)
    ours, theirs = socket.socketpair()
    engine, first = bare_engine_behind(TcpLink(ours, epoch=0, peer="the last stage"))
    theirs.sendall(pack_header(Frame(kind="result", epoch=0, step_id=0, body=b"result")) + b"re")
    engine.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.stop).result(SILENCE_S / 2)
    assert engine.wait()
    assert engine.lost is None
    first.close()
    theirs.close()


def test_an_engine_that_never_started_can_be_stopped() -> None:
    engine, first, last = bare_engine()
    engine.stop()
    with pytest.raises(StageLostError, match="stopping"):
        asyncio.run(answer(engine, [1], 1))
    first.close()
    last.close()
