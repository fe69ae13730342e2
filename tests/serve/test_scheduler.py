"""What the scheduler decides, and that no decision changes a token."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import UsageError
from magnetar.serve.engine.request import GenerationParams, Request, TokenEvent
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import Sample, StepPlan, StepResult
from magnetar.tests.fake_stage import expected_tokens, fake_stages, run_step

ROOMY = 64
"""KV blocks that are never short in the tests of single decisions."""


def make_scheduler(
    *,
    num_kv_blocks: int = ROOMY,
    max_running: int = 8,
    num_stages: int = 1,
    max_step_tokens: int = 32,
    eos_token_ids: frozenset[int] = frozenset(),
) -> Scheduler:
    return Scheduler(
        num_kv_blocks=num_kv_blocks,
        max_context_tokens=256,
        max_running=max_running,
        num_stages=num_stages,
        eos_token_ids=eos_token_ids,
        max_step_tokens=max_step_tokens,
    )


def add(
    scheduler: Scheduler,
    request_id: int,
    num_prompt_tokens: int = 1,
    params: GenerationParams | None = None,
) -> None:
    """Without the cache, unless `params` want it: single decisions are easier told so."""
    scheduler.add(
        Request(
            request_id=request_id,
            prompt_ids=tuple(range(1, num_prompt_tokens + 1)),
            params=params or GenerationParams(max_tokens=30, reads_cache=False),
        )
    )


def next_plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    scheduler.check_integrity()
    assert plan is not None
    return plan


def answer(scheduler: Scheduler, plan: StepPlan, token_id: int = 5) -> dict[int, TokenEvent]:
    """Complete a step with the same token for every row that asks for one."""
    samples = tuple(
        Sample(request_id=row.request_id, token_id=token_id)
        for row in plan.rows
        if row.sampling is not None
    )
    events = scheduler.complete(StepResult(step_id=plan.step_id, samples=samples))
    scheduler.check_integrity()
    return dict(events)


def rows_of(plan: StepPlan) -> list[tuple[int, int, int]]:
    """Request, position and number of tokens of each row."""
    return [(row.request_id, row.position, len(row.token_ids)) for row in plan.rows]


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


EOS = frozenset(range(0, 1000, 250))


def wanted(prompt: Sequence[int], params: GenerationParams) -> list[int]:
    """The answer that the fake model gives to a lone request."""
    stops = params.stop_token_ids | (frozenset() if params.ignore_eos else EOS)
    tokens = expected_tokens(prompt, params.max_tokens)
    ends = (index for index, token in enumerate(tokens) if token in stops)
    return tokens[: next(ends, len(tokens)) + 1]


class Simulation:
    """A scheduler, and fake stages at the end of a belt of steps in flight."""

    def __init__(self, scheduler: Scheduler, *, num_stages: int, num_kv_blocks: int) -> None:
        self.scheduler = scheduler
        self.stages = fake_stages(num_stages, num_kv_blocks=num_kv_blocks)
        self.num_kv_blocks = num_kv_blocks
        self.belt: deque[StepPlan] = deque()
        self.paths: dict[int, dict[int, tuple[int, int]]] = {}
        self.answers: list[list[int]] = []
        self.events: list[list[TokenEvent]] = []
        self.aborted: set[int] = set()

    def add(self, prompt: Sequence[int], params: GenerationParams, num_begun: int = 0) -> None:
        """With so many tokens of the answer from elsewhere, but one at least still to come."""
        request_id, tokens = len(self.answers), wanted(prompt, params)
        num_begun = min(num_begun, len(tokens) - 1)
        self.answers.append(tokens[num_begun:])
        self.events.append([])
        request = Request(
            request_id=request_id,
            prompt_ids=tuple(prompt),
            params=params,
            begun_ids=tuple(tokens[:num_begun]),
        )
        self.scheduler.add(request)
        self.scheduler.check_integrity()

    def abort(self, request_id: int) -> None:
        self.aborted.add(request_id)
        self.scheduler.abort(request_id)
        self.scheduler.check_integrity()

    def schedule(self) -> bool:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return False
        assert plan.rows
        assert all(row.token_ids for row in plan.rows)
        self._follow(plan)
        self.belt.append(plan)
        return True

    def _follow(self, plan: StepPlan) -> None:
        """Rows of one request follow each other, and each is as when its tokens came first."""
        ends: dict[int, int] = {}
        for row in plan.rows:
            assert ends.get(row.request_id, row.position) == row.position
            ends[row.request_id] = row.position + len(row.token_ids)
            path = self.paths.setdefault(row.request_id, {})
            request = self.scheduler._admission.requests[row.request_id]
            for position in range(row.position, ends[row.request_id]):
                # What others computed at first has no row of its own to follow.
                if position >= (request.num_cached_tokens or 0):
                    shape = (row.position, len(row.token_ids))
                    assert path.setdefault(position, shape) == shape

    def complete(self) -> bool:
        if not self.belt:
            return False
        result = run_step(self.stages, self.belt.popleft())
        for request_id, token_event in self.scheduler.complete(result):
            assert all(past.finish_reason is None for past in self.events[request_id])
            self.events[request_id].append(token_event)
        self.scheduler.check_integrity()
        return True

    def finish(self) -> None:
        """Run dry; every answer must be whole and every block free."""
        for _ in range(10_000):
            while self.schedule():
                pass
            if not self.complete():
                break
        assert not self.scheduler.has_requests
        assert self.scheduler.num_free_blocks == self.num_kv_blocks
        for request_id, (tokens, events) in enumerate(zip(self.answers, self.events, strict=True)):
            assert [event.token_id for event in events] == tokens[: len(events)]
            if request_id not in self.aborted:
                assert len(events) == len(tokens)
                assert events[-1].finish_reason in ("stop", "length")


def shared_start(stem: int, length: int, tail: list[int]) -> list[int]:
    """A prompt that begins like others of its stem."""
    return [*((stem * 331 + 7 * index) % 1000 for index in range(length)), *tail]


REQUESTS = st.tuples(
    st.builds(
        shared_start,
        st.integers(0, 1),
        st.integers(0, 50),
        st.lists(st.integers(0, 999), min_size=1, max_size=20),
    ),
    st.builds(
        GenerationParams,
        max_tokens=st.integers(1, 20),
        ignore_eos=st.booleans(),
        stop_token_ids=st.frozensets(st.integers(0, 999), max_size=4),
        cache_salt=st.sampled_from(["", "", "mine", "\ud800"]),
        reads_cache=st.booleans(),
        priority=st.integers(-1, 1),
    ),
    st.sampled_from([0, 0, 1, 3, 19]),
)
MOVES = st.lists(
    st.one_of(
        REQUESTS,
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("schedule"), st.integers(1, 5)),
        st.tuples(st.just("complete"), st.integers(1, 5)),
    ),
    max_size=30,
)


@given(
    moves=MOVES,
    num_kv_blocks=st.integers(6, 12),
    max_step_tokens=st.integers(1, 64),
    num_stages=st.integers(1, 4),
    max_running=st.integers(1, 8),
)
def test_every_request_gets_the_tokens_of_a_lone_one_and_every_block_comes_back(
    moves: list[tuple[object, ...]],
    num_kv_blocks: int,
    max_step_tokens: int,
    num_stages: int,
    max_running: int,
) -> None:
    scheduler = make_scheduler(
        num_kv_blocks=num_kv_blocks,
        max_running=max_running,
        max_step_tokens=max_step_tokens,
        num_stages=num_stages,
        eos_token_ids=EOS,
    )
    run = Simulation(scheduler, num_stages=num_stages, num_kv_blocks=num_kv_blocks)
    for what, value, *rest in moves:
        if isinstance(value, GenerationParams):
            assert isinstance(what, list)
            (num_begun,) = rest
            assert isinstance(num_begun, int)
            run.add(what, value, num_begun)
            continue
        assert isinstance(value, int)
        if what == "abort":
            run.abort(value)
            continue
        for _ in range(value):
            if what == "schedule":
                run.schedule()
            else:
                run.complete()
    run.finish()


def test_nothing_is_lost_when_blocks_are_short_and_clients_leave() -> None:
    """Random load under pressure, which hypothesis seldom finds: its examples are small.

    The fake model's every token depends on all before it, so that a wrong block would show.
    """
    num_preemptions = num_cache_hits = 0
    for seed in range(60):
        random = Random(seed)
        num_stages, num_kv_blocks = random.randint(1, 4), random.randint(8, 14)
        scheduler = make_scheduler(
            num_kv_blocks=num_kv_blocks,
            max_running=random.randint(3, 8),
            max_step_tokens=random.choice([3, 16, 64]),
            num_stages=num_stages,
            eos_token_ids=EOS,
        )
        run = Simulation(scheduler, num_stages=num_stages, num_kv_blocks=num_kv_blocks)
        for _ in range(300):
            chance = random.random()
            if chance < 0.05 and len(run.answers) < 12:
                length = random.randint(0, 39)
                prompt = shared_start(random.randrange(2), length, [random.randrange(1000)])
                params = GenerationParams(
                    max_tokens=random.randint(20, 80),
                    ignore_eos=True,
                    cache_salt=random.choice(["", "", "mine"]),
                    reads_cache=seed % 3 > 0,
                    priority=random.choice([-1, 0, 0, 0, 5]),
                )
                run.add(prompt, params, random.choice([0, 0, 0, 7, 30]))
            elif chance < 0.06 and run.answers:
                run.abort(random.randrange(len(run.answers)))
            elif chance < 0.5:
                run.schedule()
            else:
                run.complete()
        run.finish()
        num_preemptions += scheduler.num_preemptions
        num_cache_hits += scheduler.num_cache_hits
    assert num_preemptions > 50
    assert num_cache_hits > 1000


def test_the_fake_stages_can_tell_a_block_with_two_owners() -> None:
    """The oracle of the tests above can fail."""
    (stage,) = fake_stages(1, num_kv_blocks=2)
    scheduler = make_scheduler(num_kv_blocks=2)
    add(scheduler, 0, 16, GenerationParams(max_tokens=2))
    plan = next_plan(scheduler)
    stage.step(plan, None)
    stolen = replace(plan.rows[0], request_id=1, token_ids=(9,) * 16, sampling=None)
    stage.step(replace(plan, rows=(stolen,)), None)
    one_more = replace(plan.rows[0], new_block_ids=(1,), position=16, token_ids=(1,))
    result = stage.step(replace(plan, rows=(one_more,)), None)
    assert isinstance(result, StepResult)
    assert [sample.token_id for sample in result.samples] != expected_tokens([*range(1, 17), 1], 1)
