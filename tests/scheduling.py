"""A scheduler driven by hand: what to add, the next plan, and an answer to it."""

from magnetar.serve.engine.request import GenerationParams, Request, TokenEvent
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import Sample, StepPlan, StepResult

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
