"""What the scheduler decides, and that no decision changes a token."""

import pytest

from magnetar.errors import UsageError
from magnetar.serve.engine.request import GenerationParams, Request, TokenEvent
from magnetar.serve.engine.step import Sample, StepPlan, StepResult
from magnetar.tests.fake_stage import expected_tokens, fake_stages
from magnetar.tests.scheduling import ROOMY, add, answer, make_scheduler, next_plan, rows_of
from magnetar.tests.stages import run_step


def test_a_long_prompt_is_computed_in_chunks_and_sampled_once() -> None:
    scheduler = make_scheduler(num_stages=3)
    add(scheduler, 0, 70)
    plans = [next_plan(scheduler) for _ in range(3)]
    assert [rows_of(plan) for plan in plans] == [[(0, 0, 32)], [(0, 32, 32)], [(0, 64, 6)]]
    assert [plan.rows[0].sampling is not None for plan in plans] == [False, False, True]
    assert [len(plan.rows[0].new_block_ids) for plan in plans] == [5, 0, 0]


def test_decoding_and_prompts_share_a_step_and_its_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=8)
    add(scheduler, 0, 3)
    answer(scheduler, next_plan(scheduler))
    add(scheduler, 1, 20)
    assert rows_of(next_plan(scheduler)) == [(0, 3, 1), (1, 0, 7)]


def test_nothing_is_scheduled_for_a_request_whose_token_is_awaited() -> None:
    scheduler = make_scheduler(num_stages=4)
    add(scheduler, 0)
    plan = next_plan(scheduler)
    assert scheduler.schedule() is None
    answer(scheduler, plan)
    assert rows_of(next_plan(scheduler)) == [(0, 1, 1)]


def test_one_step_more_than_stages_is_in_flight() -> None:
    scheduler = make_scheduler(num_stages=2, max_step_tokens=8)
    add(scheduler, 0, 100)
    plans = [next_plan(scheduler) for _ in range(3)]
    assert scheduler.schedule() is None
    answer(scheduler, plans[0])
    assert next_plan(scheduler).step_id == 3


def test_decoding_requests_are_shared_out_evenly_among_the_stages() -> None:
    scheduler = make_scheduler(num_stages=3)
    for request_id in range(7):
        add(scheduler, request_id)
    answer(scheduler, next_plan(scheduler))
    plans = [next_plan(scheduler) for _ in range(3)]
    assert [[row.request_id for row in plan.rows] for plan in plans] == [[0, 1, 2], [3, 4, 5], [6]]
    assert scheduler.schedule() is None


def test_requests_of_different_steps_come_together_again() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0)
    first = next_plan(scheduler)
    add(scheduler, 1)
    # The second slot is for more of a long prompt, not for another half-empty batch.
    assert scheduler.schedule() is None
    answer(scheduler, first)
    answer(scheduler, next_plan(scheduler))
    assert rows_of(next_plan(scheduler)) == [(0, 2, 1), (1, 1, 1)]


def test_the_longest_waiting_decode_goes_first() -> None:
    scheduler = make_scheduler(num_stages=2)
    for request_id in range(3):
        add(scheduler, request_id)
    answer(scheduler, next_plan(scheduler))
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert [row.request_id for row in second.rows] == [2]
    answer(scheduler, first)
    answer(scheduler, second)
    assert [row.request_id for row in next_plan(scheduler).rows] == [0, 1]
    assert [row.request_id for row in next_plan(scheduler).rows] == [2]


def test_an_answer_ends_at_max_tokens_and_gives_its_blocks_back() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, params=GenerationParams(max_tokens=2))
    reasons = [answer(scheduler, next_plan(scheduler))[0].finish_reason for _ in range(2)]
    assert reasons == [None, "length"]
    assert not scheduler.has_requests
    assert scheduler.num_free_blocks == ROOMY


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (GenerationParams(max_tokens=9), "stop"),
        (GenerationParams(max_tokens=1), "stop"),
        (GenerationParams(max_tokens=9, ignore_eos=True), None),
        (GenerationParams(max_tokens=9, ignore_eos=True, stop_token_ids=frozenset({7})), "stop"),
    ],
)
def test_stops_at_end_of_text_and_at_stop_tokens(
    params: GenerationParams, reason: str | None
) -> None:
    scheduler = make_scheduler(eos_token_ids=frozenset({7}))
    add(scheduler, 0, params=params)
    assert answer(scheduler, next_plan(scheduler), token_id=7)[0].finish_reason == reason


def test_the_newest_request_gives_its_blocks_to_older_ones_and_starts_again() -> None:
    scheduler = make_scheduler(num_kv_blocks=4)
    add(scheduler, 0, 16)
    add(scheduler, 1, 16)
    while not scheduler.num_preemptions:
        plan = next_plan(scheduler)
        answer(scheduler, plan)
    # 32 tokens each are in the cache; the older one goes on alone.
    assert rows_of(plan) == [(0, 32, 1)]
    assert plan.released == (1,)
    assert scheduler.num_waiting == 1
    scheduler.abort(0)
    plan = next_plan(scheduler)
    assert rows_of(plan)[0] == (1, 0, 16)
    assert plan.released == (0,)
    rest = next_plan(scheduler)
    assert [row.position for row in (*plan.rows[1:], *rest.rows)] == list(range(16, 32))
    answer(scheduler, plan)
    assert rows_of(last := next_plan(scheduler)) == [(1, 32, 1)]
    assert last.rows[0].sampling is not None


def test_a_preempted_request_takes_the_path_of_its_first_run_again() -> None:
    scheduler = make_scheduler(num_kv_blocks=8, max_running=4)
    add(scheduler, 0, 40)
    add(scheduler, 1, 50)
    while not scheduler.num_preemptions:
        answer(scheduler, next_plan(scheduler))
    scheduler.abort(0)
    steps: list[list[tuple[int, int]]] = []
    plans: list[StepPlan] = []
    while not plans or plans[-1].rows[-1].sampling is None:
        plans.append(next_plan(scheduler))
        steps.append([(position, count) for _, position, count in rows_of(plans[-1])])
        if len(plans) > 1:
            scheduler.complete(StepResult(step_id=plans[-2].step_id, samples=()))
    # Its prompt in the rows that there was room for beside the other one, which took 32 and then 8
    # tokens of the first steps, and no more of its answer at once than may decode.
    path = [row for step in steps for row in step]
    prompt_rows, answer_rows = path[:3], path[3:]
    assert prompt_rows == [(0, 16), (16, 16), (32, 18)]
    assert answer_rows == [(50 + index, 1) for index in range(len(answer_rows))]
    assert max(sum(row in answer_rows for row in step) for step in steps) == 4


def test_a_row_that_is_computed_again_is_not_cut_for_those_that_decode() -> None:
    scheduler = make_scheduler(num_kv_blocks=6)
    add(scheduler, 1, 32, GenerationParams(max_tokens=40, reads_cache=False, priority=1))
    answer(scheduler, next_plan(scheduler))
    add(scheduler, 0, 16)
    while not scheduler.num_preemptions:
        answer(scheduler, next_plan(scheduler))
    add(scheduler, 2)
    plan = next_plan(scheduler)
    while 1 not in [row.request_id for row in plan.rows]:
        answer(scheduler, plan)
        plan = next_plan(scheduler)
    # The budget is 32 tokens.
    assert [(row.request_id, len(row.token_ids)) for row in plan.rows] == [(2, 1), (1, 32)]


def test_an_answer_begun_elsewhere_goes_on_after_its_prompt_in_rows_of_one_token() -> None:
    scheduler = make_scheduler(max_running=4)
    prompt = tuple(range(1, 41))
    begun = tuple(expected_tokens(prompt, 6))
    params = GenerationParams(max_tokens=8, reads_cache=False)
    scheduler.add(Request(request_id=0, prompt_ids=prompt, params=params, begun_ids=begun))
    stages = fake_stages(1, num_kv_blocks=ROOMY)
    path, told = [], []
    while (plan := scheduler.schedule()) is not None:
        path.append([(position, count) for _, position, count in rows_of(plan)])
        told += [event for _, event in scheduler.complete(run_step(stages, plan))]
    # As many at once as may decode; the last known token is sampled from.
    ones = [[(n, 1) for n in range(40, 44)], [(44, 1), (45, 1)], [(46, 1)]]
    assert path == [[(0, 32)], [(32, 8)], *ones]
    assert [event.token_id for event in told] == expected_tokens(prompt, 8)[6:]
    assert [event.finish_reason for event in told] == [None, "length"]


def test_a_token_in_flight_for_a_preempted_request_counts() -> None:
    scheduler = make_scheduler(num_kv_blocks=5, num_stages=2, max_step_tokens=64)
    add(scheduler, 0, 30)
    add(scheduler, 1, 31)
    answer(scheduler, next_plan(scheduler))
    old, new = next_plan(scheduler), next_plan(scheduler)
    answer(scheduler, old)
    old = next_plan(scheduler)
    answer(scheduler, new)
    new = next_plan(scheduler)  # takes the last block
    answer(scheduler, old)
    old = next_plan(scheduler)
    assert (rows_of(old), old.released) == ([(0, 32, 1)], (1,))
    assert list(answer(scheduler, new)) == [1]
    scheduler.abort(0)
    again = next_plan(scheduler)
    assert [row.token_ids for row in again.rows] == [tuple(range(1, 32)), (5,), (5,), (5,)]


def test_waiting_requests_do_not_overtake() -> None:
    scheduler = make_scheduler(num_kv_blocks=5)
    add(scheduler, 0, 32)
    add(scheduler, 1, 50)
    add(scheduler, 2, 1)
    assert [row.request_id for row in next_plan(scheduler).rows] == [0]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)


def test_a_lower_priority_value_is_admitted_first_and_equal_ones_by_arrival() -> None:
    scheduler = make_scheduler(max_running=1)
    for request_id, priority in enumerate([0, 0, 7, -1, -1]):
        add(scheduler, request_id, params=GenerationParams(max_tokens=1, priority=priority))
    order = []
    while scheduler.has_requests:
        plan = next_plan(scheduler)
        order += [row.request_id for row in plan.rows]
        answer(scheduler, plan)
    assert order == [3, 4, 0, 1, 2]


def test_the_worst_priority_gives_its_blocks_although_it_came_first() -> None:
    scheduler = make_scheduler(num_kv_blocks=4)
    for request_id, priority in enumerate([1, 0]):
        params = GenerationParams(max_tokens=30, reads_cache=False, priority=priority)
        add(scheduler, request_id, 16, params)
    while not scheduler.num_preemptions:
        plan = next_plan(scheduler)
        answer(scheduler, plan)
    assert rows_of(plan) == [(1, 32, 1)]
    assert plan.released == (0,)


def test_a_better_request_that_arrives_takes_no_blocks_from_running_ones() -> None:
    scheduler = make_scheduler(num_kv_blocks=4, max_step_tokens=64)
    add(scheduler, 0, 30)
    answer(scheduler, next_plan(scheduler))
    add(scheduler, 1, 30, GenerationParams(max_tokens=9, priority=-5, reads_cache=False))
    assert rows_of(next_plan(scheduler)) == [(0, 30, 1)]
    assert (scheduler.num_waiting, scheduler.num_preemptions) == (1, 0)


def test_an_aborted_request_is_forgotten_at_once_and_its_token_dropped() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0)
    plan = next_plan(scheduler)
    scheduler.abort(0)
    scheduler.abort(0)
    scheduler.abort(99)
    assert scheduler.num_free_blocks == ROOMY
    assert answer(scheduler, plan) == {}
    add(scheduler, 1)
    plan = next_plan(scheduler)
    assert plan.released == (0,)
    answer(scheduler, plan)
    assert next_plan(scheduler).released == ()


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "words"),
    [
        (0, 1, "a prompt of 0 tokens"),
        (1, 0, "an answer of 0"),
        (200, 57, "200 tokens of prompt and 57 of answer are more than the context of 256"),
        (60, 6, "need 5 KV blocks and there are 4"),
    ],
)
def test_what_can_never_fit_is_refused(num_prompt_tokens: int, max_tokens: int, words: str) -> None:
    scheduler = make_scheduler(num_kv_blocks=4)
    with pytest.raises(UsageError, match=words):
        add(scheduler, 0, num_prompt_tokens, GenerationParams(max_tokens=max_tokens))
    assert not scheduler.has_requests


def test_the_longest_request_that_fits_is_taken() -> None:
    scheduler = make_scheduler(num_kv_blocks=4)
    add(scheduler, 0, 60, GenerationParams(max_tokens=5))
    events: dict[int, TokenEvent] = {}
    while scheduler.has_requests:
        events = answer(scheduler, next_plan(scheduler))
    assert events[0].finish_reason == "length"


def test_results_must_be_those_of_the_oldest_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, 0, 40)
    plan = next_plan(scheduler)
    with pytest.raises(ValueError, match="the result of step 1 came out of turn"):
        scheduler.complete(StepResult(step_id=1, samples=()))
    stray = (Sample(request_id=0, token_id=1),)
    with pytest.raises(ValueError, match="step 0 brought tokens that were not asked for"):
        scheduler.complete(StepResult(step_id=plan.step_id, samples=stray))
