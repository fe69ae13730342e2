"""Whatever arrives, leaves or is preempted: right tokens, and no block lost."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.engine.request import GenerationParams, Request, TokenEvent
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import StepPlan, StepResult
from magnetar.tests.fake_stage import expected_tokens, fake_stages
from magnetar.tests.scheduling import add, make_scheduler, next_plan
from magnetar.tests.stages import run_step

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
