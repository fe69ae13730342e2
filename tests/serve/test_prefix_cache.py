"""Prompts that begin alike share their full blocks."""

from dataclasses import replace

import pytest

from magnetar.serve.engine.request import GenerationParams, Request
from magnetar.tests.scheduling import add, answer, make_scheduler, next_plan, rows_of

CACHED = GenerationParams(max_tokens=30)


def test_a_later_request_computes_only_what_no_earlier_one_has() -> None:
    scheduler = make_scheduler(max_step_tokens=64)
    add(scheduler, 0, 40, CACHED)
    first = next_plan(scheduler)
    answer(scheduler, first)
    scheduler.abort(0)
    add(scheduler, 1, 50, CACHED)
    plan = next_plan(scheduler)
    assert rows_of(plan) == [(1, 32, 18)]
    assert plan.rows[0].new_block_ids[:2] == first.rows[0].new_block_ids[:2]
    assert (scheduler.num_cache_queries, scheduler.num_cache_hits) == (90, 32)
    events = [answer(scheduler, plan)[1], answer(scheduler, next_plan(scheduler))[1]]
    assert [event.num_cached_tokens for event in events] == [32, 0]


def test_generated_tokens_are_found_too() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 10, GenerationParams(max_tokens=8))
    while scheduler.has_requests:
        answer(scheduler, next_plan(scheduler), token_id=5)
    follow_up = Request(request_id=1, prompt_ids=(*range(1, 11), *[5] * 8, 9), params=CACHED)
    scheduler.add(follow_up)
    assert rows_of(next_plan(scheduler)) == [(1, 16, 3)]


@pytest.mark.parametrize(("num_tokens", "num_cached"), [(32, 16), (33, 32)])
def test_at_least_one_token_of_a_known_prompt_is_computed(num_tokens: int, num_cached: int) -> None:
    scheduler = make_scheduler(max_step_tokens=64)
    add(scheduler, 0, 40, CACHED)
    answer(scheduler, next_plan(scheduler))
    scheduler.abort(0)
    add(scheduler, 1, num_tokens, CACHED)
    plan = next_plan(scheduler)
    assert rows_of(plan) == [(1, num_cached, num_tokens - num_cached)]
    assert plan.rows[0].sampling is not None


def test_a_block_is_shared_once_the_step_that_fills_it_is_scheduled() -> None:
    """Its result need not have come, and its request may be gone: order is enough."""
    scheduler = make_scheduler(num_stages=2, max_step_tokens=64)
    add(scheduler, 0, 40, CACHED)
    add(scheduler, 1, 40, CACHED)
    together = next_plan(scheduler)
    # Not within one step: the order of its rows is the stages' affair.
    assert rows_of(together) == [(0, 0, 40), (1, 0, 16)]
    scheduler.abort(0)
    add(scheduler, 2, 40, CACHED)
    plan = next_plan(scheduler)
    assert rows_of(plan) == [(1, 16, 24), (2, 32, 8)]
    assert plan.rows[1].new_block_ids[:2] == together.rows[0].new_block_ids[:2]


@pytest.mark.parametrize(
    "params", [replace(CACHED, cache_salt="mine"), replace(CACHED, reads_cache=False)]
)
def test_another_salt_and_whoever_wants_every_token_share_nothing(params: GenerationParams) -> None:
    scheduler = make_scheduler(max_step_tokens=64)
    add(scheduler, 0, 40, CACHED)
    answer(scheduler, next_plan(scheduler))
    scheduler.abort(0)
    add(scheduler, 1, 40, params)
    assert rows_of(next_plan(scheduler)) == [(1, 0, 40)]
    assert scheduler.num_cache_hits == 0


def test_requests_that_share_blocks_fit_where_they_would_not_apart() -> None:
    scheduler = make_scheduler(num_kv_blocks=6, max_step_tokens=64)
    add(scheduler, 0, 50, CACHED)
    answer(scheduler, next_plan(scheduler))
    add(scheduler, 1, 50, CACHED)
    assert rows_of(next_plan(scheduler)) == [(0, 50, 1), (1, 48, 2)]
    assert scheduler.num_free_blocks == 1


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make_scheduler(num_kv_blocks=5, max_step_tokens=17)
    add(scheduler, 0, 30, GenerationParams(max_tokens=30, reads_cache=False))
    scheduler.add(Request(request_id=1, prompt_ids=tuple(range(100, 130)), params=CACHED))
    while not scheduler.num_preemptions:
        answer(scheduler, next_plan(scheduler))
    scheduler.abort(0)
    assert rows_of(next_plan(scheduler))[0] == (1, 16, 14)
    assert scheduler.num_cache_queries == 30
