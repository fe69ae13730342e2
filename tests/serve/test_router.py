"""Which pipeline a request goes to, and that it goes on elsewhere when that one is lost."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import QueueFullError, StageLostError, UsageError
from magnetar.serve.engine.engine import Engine
from magnetar.serve.engine.request import GenerationParams, TokenEvent
from magnetar.serve.engine.router import (
    BUSIER,
    BUSIER_REQUESTS,
    TELLING_SHARE,
    Load,
    Routed,
    Router,
    preference,
)
from magnetar.serve.engine.stats import EngineStats, total
from magnetar.tests.fake_stage import (
    FakeStage,
    GatedStage,
    expected_tokens,
    fake_stages,
    running_engine,
)

TIMEOUT_S = 20.0
PROMPT = tuple(range(1, 41))

LOADS = st.builds(
    Load,
    num_requests=st.integers(0, 12),
    has_room=st.booleans(),
    speed=st.sampled_from([0.5, 1.0, 2.0, 7.5]),
    num_cached=st.sampled_from([0, 16, 32, 48, 64]),
)


def idle(**changes: object) -> Load:
    load = Load(num_requests=0, has_room=True, speed=1.0)
    return replace(load, **changes)  # type: ignore[arg-type]


def best_by_rules(loads: Sequence[Load], num_prompt_tokens: int) -> int:
    """Rule after rule, each taking away those that are worse than another."""
    left = list(range(len(loads)))
    if any(load.has_room for load in loads):
        left = [index for index in left if loads[index].has_room]

    def wait(index: int) -> float:
        return (loads[index].num_requests + 1) / loads[index].speed

    least = min(map(wait, left))
    calm = []
    for index in left:
        fair = least * loads[index].speed
        if wait(index) <= BUSIER * least or loads[index].num_requests + 1 <= fair + BUSIER_REQUESTS:
            calm.append(index)

    def cached(index: int) -> int:
        held = loads[index].num_cached
        return held if held >= TELLING_SHARE * num_prompt_tokens else 0

    most = max(map(cached, calm))
    holders = [index for index in calm if cached(index) == most]
    return min(holders, key=lambda index: (wait(index), index))


@given(loads=st.lists(LOADS, min_size=1, max_size=5), num_prompt_tokens=st.integers(65, 300))
def test_the_first_choice_is_the_one_that_the_rules_leave(
    loads: list[Load], num_prompt_tokens: int
) -> None:
    order = preference(loads, num_prompt_tokens)
    assert sorted(order) == list(range(len(loads)))
    assert order[0] == best_by_rules(loads, num_prompt_tokens)


@given(
    speeds=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=4),
    count=st.integers(0, 40),
)
def test_requests_without_a_past_spread_as_the_best_of_all_divisions_does(
    speeds: list[float], count: int
) -> None:
    """The longest wait is as short as in the best of all divisions."""
    counts = [0] * len(speeds)
    for _ in range(count):
        loads = [idle(num_requests=n, speed=s) for n, s in zip(counts, speeds, strict=True)]
        counts[preference(loads, 100)[0]] += 1

    def longest(division: Sequence[int]) -> float:
        return max(n / s for n, s in zip(division, speeds, strict=True))

    # A bound t serves floor(t * speed) requests each; the best t is one of these.
    bounds = sorted({n / s for s in speeds for n in range(count + 1)})
    best = next(t for t in bounds if sum(int(t * s + 1e-9) for s in speeds) >= count)
    assert longest(counts) == pytest.approx(best)


def test_a_cached_prompt_wins_until_its_pipeline_is_clearly_busier() -> None:
    def chosen(num_requests: int) -> int:
        loads = [idle(num_requests=4), idle(num_requests=num_requests, num_cached=64)]
        return preference(loads, 80)[0]

    assert [chosen(n) for n in (4, 6, 8)] == [1, 1, 1]
    assert chosen(9) == 0


def test_few_tokens_of_a_long_prompt_in_the_cache_do_not_count() -> None:
    loads = [idle(), idle(num_requests=1, num_cached=64)]
    assert preference(loads, 64 * 5)[0] == 0
    assert preference(loads, 64 * 4)[0] == 1


@contextmanager
def routing(
    *pipelines: Sequence[FakeStage],
    num_kv_blocks: int = 64,
    max_waiting: int = 256,
    max_wait_s: float = TIMEOUT_S,
) -> Iterator[tuple[Router, list[Engine]]]:
    """A router over engines with real links; 8 requests at once each."""
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                running_engine(
                    stages, num_kv_blocks=num_kv_blocks, max_running=8, max_waiting=max_waiting
                )
            )[0]
            for stages in pipelines
        ]
        yield Router([routed(each) for each in engines], max_wait_s=max_wait_s), engines


def routed(engine: Engine) -> Routed:
    return Routed(engine=engine, speed=1.0, max_running=8)


def gated(count: int) -> list[GatedStage]:
    return [GatedStage(num_kv_blocks=64, is_first=True, is_last=True) for _ in range(count)]


def stages_that_fail_at(step: int | None, num_stages: int = 2) -> list[FakeStage]:
    stages = fake_stages(num_stages, num_kv_blocks=64)
    stages[-1].fail_at_step = step
    return stages


async def answer(
    router: Router, prompt: Sequence[int], params: GenerationParams
) -> list[TokenEvent]:
    async with asyncio.timeout(TIMEOUT_S):
        return [event async for event in router.generate(prompt, params)]


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def test_requests_at_once_are_spread_and_get_their_own_tokens() -> None:
    prompts = [tuple(range(start, start + 30)) for start in range(12)]
    gates = gated(2)

    async def run(router: Router, engines: list[Engine]) -> list[list[TokenEvent]]:
        params = GenerationParams(max_tokens=20)
        asking = [asyncio.create_task(answer(router, prompt, params)) for prompt in prompts]
        await asyncio.sleep(0)
        busy = [engine.stats() for engine in engines]
        assert [each.running + each.waiting for each in busy] == [6, 6]
        for gate in gates:
            gate.gate.set()
        return await asyncio.gather(*asking)

    with routing([gates[0]], [gates[1]]) as (router, engines):
        answers = asyncio.run(run(router, engines))
        stats = router.stats()
    assert [tokens(events) for events in answers] == [expected_tokens(p, 20) for p in prompts]
    assert len(stats.pipelines) == 2
    assert (stats.num_kv_blocks, stats.kv_blocks_free, stats.num_moved) == (128, 128, 0)
    assert stats.num_cache_queries == 12 * 30


def test_a_prompt_goes_to_the_pipeline_that_has_computed_it_before() -> None:
    async def run(router: Router) -> list[int]:
        params = GenerationParams(max_tokens=2)
        told = []
        for _ in range(6):
            events = await answer(router, PROMPT, params)
            assert tokens(events) == expected_tokens(PROMPT, 2)
            told.append(events[0].num_cached_tokens)
        salted = await answer(router, PROMPT, replace(params, cache_salt="mine"))
        assert salted[0].num_cached_tokens == 0
        return told

    with routing(stages_that_fail_at(None), stages_that_fail_at(None)) as (router, _):
        assert asyncio.run(run(router)) == [0, 32, 32, 32, 32, 32]


class CountingGrammar:
    """Allows everything, and remembers what its matchers took."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []

    def start(self) -> "CountingMatcher":
        self.taken.append([])
        return CountingMatcher(self.taken[-1])


class CountingMatcher:
    def __init__(self, taken: list[int]) -> None:
        self._taken = taken

    def allowed(self) -> bytes:
        return b"\xff" * 125

    def accept(self, token_id: int) -> None:
        self._taken.append(token_id)


def test_answers_of_a_lost_pipeline_go_on_in_another_without_a_token_lost_or_doubled() -> None:
    prompts = [tuple(range(start, start + 20)) for start in range(10)]
    grammar = CountingGrammar()
    gates = gated(2)
    gates[0].fail_at_step = 9

    async def run(router: Router) -> list[list[TokenEvent]]:
        params = GenerationParams(max_tokens=30, grammar=grammar)
        asking = [asyncio.create_task(answer(router, prompt, params)) for prompt in prompts]
        await asyncio.sleep(0)
        for gate in gates:
            gate.gate.set()
        return await asyncio.gather(*asking)

    with routing([gates[0]], [gates[1]]) as (router, engines):
        answers = asyncio.run(run(router))
        stats = router.stats()
        assert isinstance(engines[0].lost, StageLostError)
        assert engines[1].lost is None
    assert [tokens(events) for events in answers] == [expected_tokens(p, 30) for p in prompts]
    assert {events[-1].finish_reason for events in answers} == {"length"}
    # Five went on, each with the grammar behind the tokens that it had.
    assert stats.num_moved == 5
    assert sorted(taken for taken in grammar.taken if len(taken) == 30) == sorted(
        expected_tokens(prompt, 30) for prompt in prompts
    )
    assert [each.is_over for each in stats.pipelines] == [True, False]
    assert stats.num_kv_blocks == 64


def test_one_that_is_lost_gets_no_request_any_more_and_the_last_one_ends_with_its_error() -> None:
    async def run(router: Router, engines: list[Engine]) -> None:
        params = GenerationParams(max_tokens=40)
        assert tokens(await answer(router, PROMPT, params)) == expected_tokens(PROMPT, 40)
        assert engines[0].lost is not None
        assert tokens(await answer(router, PROMPT, params)) == expected_tokens(PROMPT, 40)
        assert await router.probe() > 0
        with pytest.raises(StageLostError, match="told to fail"):
            await answer(router, range(300), replace(params, max_tokens=100))
        with pytest.raises(StageLostError, match="no pipeline is up now"):
            await answer(router, PROMPT, params)
        with pytest.raises(StageLostError, match="no pipeline is up now"):
            await router.probe()

    failing = (stages_that_fail_at(5), stages_that_fail_at(120))
    with routing(*failing, max_wait_s=0.01) as (router, engines):
        asyncio.run(run(router, engines))
        assert router.stats().is_over


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not reached():
            await asyncio.sleep(0.001)


def test_answers_wait_for_their_lost_pipeline_and_go_on_when_it_is_back() -> None:
    prompts = [tuple(range(start, start + 20)) for start in range(6)]
    gate, *_ = gated(1)
    gate.fail_at_step = 9
    (again,) = gated(1)
    again.gate.set()

    async def run(router: Router, lost: Engine, back: Engine) -> list[list[TokenEvent]]:
        params = GenerationParams(max_tokens=30)
        asking = [asyncio.create_task(answer(router, prompt, params)) for prompt in prompts]
        await asyncio.sleep(0)
        gate.gate.set()
        await until(lambda: router.stats().waiting == len(prompts) and lost.lost is not None)
        # Who comes now is told at once.
        with pytest.raises(StageLostError, match="no pipeline is up now"):
            await answer(router, PROMPT, params)
        with pytest.raises(StageLostError, match="no pipeline is up now"):
            await router.probe()
        asking[-1].cancel()
        await until(lambda: router.stats().waiting == len(prompts) - 1)
        thread = threading.Thread(target=router.replace, args=(0, routed(back)))
        thread.start()
        answers = await asyncio.gather(*asking[:-1])
        thread.join()
        assert tokens(await answer(router, PROMPT, params)) == expected_tokens(PROMPT, 30)
        return answers

    with (
        routing([gate]) as (router, (lost,)),
        running_engine([again], num_kv_blocks=64) as (back, _),
    ):
        answers = asyncio.run(run(router, lost, back))
        stats = router.stats()
        queries = lost.stats().num_cache_queries + back.stats().num_cache_queries
    assert [tokens(events) for events in answers] == [expected_tokens(p, 30) for p in prompts[:-1]]
    assert stats.num_moved == len(prompts) - 1
    assert (stats.num_restarts, stats.pipelines[0].num_restarts) == (1, 1)
    assert stats.num_cache_queries == queries  # what counts, counts on
    assert not stats.is_over


def test_a_pipeline_that_is_lost_again_and_again_ends_no_answer_that_goes_on() -> None:
    async def run(router: Router, engines: list[Engine]) -> None:
        asking = asyncio.create_task(answer(router, PROMPT, GenerationParams(max_tokens=40)))
        for before, back in pairwise(engines):
            await until(lambda before=before: before.lost is not None)  # type: ignore[misc]
            router.replace(0, routed(back))
        assert tokens(await asking) == expected_tokens(PROMPT, 40)

    with ExitStack() as stack:
        engines = [
            stack.enter_context(running_engine(stages_that_fail_at(step), num_kv_blocks=64))[0]
            for step in (5, 6, 7, None)
        ]
        router = Router([routed(engines[0])])
        asyncio.run(run(router, engines))
        assert router.stats().num_restarts == 3


def test_what_only_the_lost_pipeline_could_hold_waits_for_it() -> None:
    prompt = PROMPT[:20]
    failing, healthy = stages_that_fail_at(5), fake_stages(1, num_kv_blocks=64)

    async def run(router: Router, lost: Engine, back: Engine) -> None:
        asking = asyncio.create_task(answer(router, prompt, GenerationParams(max_tokens=30)))
        await until(lambda: lost.lost is not None and router.stats().waiting == 1)
        router.replace(1, routed(back))
        assert tokens(await asking) == expected_tokens(prompt, 30)

    with (
        running_engine(fake_stages(1, num_kv_blocks=2), num_kv_blocks=2) as (small, _),
        running_engine(failing, num_kv_blocks=64) as (lost, _),
        running_engine(healthy, num_kv_blocks=64) as (back, _),
    ):
        asyncio.run(run(Router([routed(small), routed(lost)]), lost, back))


def test_nobody_waits_longer_than_the_limit_or_beyond_the_end() -> None:
    async def run(router: Router, engine: Engine) -> None:
        asking = asyncio.create_task(answer(router, PROMPT, GenerationParams(max_tokens=40)))
        await until(lambda: engine.lost is not None and router.stats().waiting == 1)
        router.close()
        with pytest.raises(StageLostError, match="told to fail"):
            await asking

    with routing(stages_that_fail_at(5)) as (router, (engine,)):
        asyncio.run(run(router, engine))
    with routing(stages_that_fail_at(5), max_wait_s=0.01) as (router, _):
        with pytest.raises(StageLostError, match="told to fail"):
            asyncio.run(answer(router, PROMPT, GenerationParams(max_tokens=40)))
        assert router.stats().waiting == 0


def test_a_request_that_breaks_whatever_it_comes_to_does_not_break_all() -> None:
    async def run(router: Router) -> None:
        with pytest.raises(StageLostError, match="told to fail"):
            await answer(router, PROMPT, GenerationParams(max_tokens=5))
        assert tokens(await answer(router, PROMPT, GenerationParams(max_tokens=5)))

    failing = [stages_that_fail_at(0), stages_that_fail_at(0), stages_that_fail_at(None)]
    with routing(*failing) as (router, engines):
        asyncio.run(run(router))
        assert [engine.lost is None for engine in engines] == [False, False, True]


def test_a_full_queue_everywhere_refuses_but_nothing_that_was_accepted_before() -> None:
    gates = gated(2)
    gates[0].fail_at_step = 0

    async def run(router: Router) -> None:
        params = GenerationParams(max_tokens=4)

        def ask(prompt: int) -> asyncio.Task[list[TokenEvent]]:
            return asyncio.create_task(answer(router, [prompt], params))

        asking = [ask(0), ask(1)]
        async with asyncio.timeout(TIMEOUT_S):
            while router.stats().running < 2:
                await asyncio.sleep(0.001)
        asking += [ask(2), ask(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await answer(router, [4], params)
        for gate in gates:
            gate.gate.set()
        answers = await asyncio.gather(*asking)
        assert [tokens(events) for events in answers] == [expected_tokens([n], 4) for n in range(4)]
        assert router.stats().num_moved == 2

    with routing([gates[0]], [gates[1]], num_kv_blocks=1, max_waiting=1) as (router, _):
        asyncio.run(run(router))


def test_what_no_pipeline_can_hold_is_refused_and_one_with_more_blocks_takes_it() -> None:
    small, large = fake_stages(1, num_kv_blocks=2), fake_stages(1, num_kv_blocks=64)
    with (
        running_engine(small, num_kv_blocks=2) as (first, _),
        running_engine(large, num_kv_blocks=64) as (second, _),
    ):
        router = Router([Routed(engine=each, speed=1.0, max_running=8) for each in (first, second)])
        prompt, params = PROMPT[:20], GenerationParams(max_tokens=30)
        assert tokens(asyncio.run(answer(router, prompt, params))) == expected_tokens(prompt, 30)
        with pytest.raises(UsageError, match="context"):
            asyncio.run(answer(router, prompt, replace(params, max_tokens=2000)))


def test_a_client_that_leaves_frees_its_blocks_wherever_they_are() -> None:
    async def run(router: Router) -> None:
        events = router.generate(PROMPT, GenerationParams(max_tokens=500))
        await anext(events)
        await events.aclose()
        async with asyncio.timeout(TIMEOUT_S):
            while router.stats().running or router.stats().waiting:
                await asyncio.sleep(0.005)

    with routing(stages_that_fail_at(None), stages_that_fail_at(None)) as (router, _):
        asyncio.run(run(router))
        assert router.stats().kv_blocks_free == 128


def test_stopping_is_told_and_moves_nothing() -> None:
    async def run(router: Router, engines: list[Engine]) -> None:
        events = router.generate(PROMPT, GenerationParams(max_tokens=900))
        await anext(events)
        for engine in engines:
            await asyncio.to_thread(engine.stop)
        with pytest.raises(StageLostError, match="the server is stopping"):
            async for _ in events:
                pass

    with routing(stages_that_fail_at(None), stages_that_fail_at(None)) as (router, engines):
        asyncio.run(run(router, engines))
        assert router.stats().num_moved == 0


def test_counts_of_experts_are_summed_and_stay_when_a_pipeline_is_lost() -> None:
    def told(is_over: bool, counts: dict[int, tuple[int, ...]]) -> EngineStats:
        return EngineStats(num_kv_blocks=4, kv_blocks_free=4, is_over=is_over, expert_tokens=counts)

    both = total([told(True, {0: (1, 2), 1: (3, 4)}), told(False, {0: (10, 20)})], num_moved=0)
    assert both.expert_tokens == {0: (11, 22), 1: (3, 4)}
    assert both.num_kv_blocks == 4
