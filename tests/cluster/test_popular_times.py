"""Predicted times where experts are not alike: those of the experts that a stage really has."""

from dataclasses import replace

import pytest

from magnetar.cluster.machines import Link
from magnetar.cluster.plan import Plan, StagePlan, Workload
from magnetar.cluster.planning.planner import plan, predicted
from magnetar.tests.cluster.test_expert_plans import alike
from magnetar.tests.planning import MIXTRAL

WIRE = Link(source="", target="", rtt_s=0.0, gbps=12.5, overhead_s=3e-6)
INVENTORY = alike(2, 80, 200, WIRE)
EVEN = ((0.25,) * 8,) * 32
SKEWED = ((0.7, 0.6, 0.3, 0.2, 0.1, 0.05, 0.04, 0.01),) * 32


def workload(popularity: tuple[tuple[float, ...], ...] | None = None) -> Workload:
    return Workload(
        max_context_tokens=1024,
        max_concurrency=4,
        separate_experts=True,
        popularity=popularity,
        objective="throughput",
    )


def rate(found: Plan) -> float:
    assert found.prediction is not None
    return found.prediction.tokens_per_s


def test_equal_popularity_changes_no_prediction() -> None:
    without, with_it = (
        plan(*MIXTRAL, INVENTORY, workload()),
        plan(*MIXTRAL, INVENTORY, workload(EVEN)),
    )
    assert any(stage.helpers for stage in without.stages)
    assert rate(with_it) == pytest.approx(rate(without), rel=1e-6)


def test_skewed_traffic_needs_fewer_experts_of_a_stage_that_has_them_all() -> None:
    whole = replace(workload(), separate_experts=False)
    found = plan(*MIXTRAL, INVENTORY, whole)
    skewed = predicted(found, *MIXTRAL, INVENTORY, replace(whole, popularity=SKEWED))
    assert rate(skewed) > rate(found)


def with_stage(found: Plan, stage: StagePlan) -> Plan:
    (pipeline,) = found.pipelines
    return replace(found, pipelines=(replace(pipeline, stages=(stage,)),))


def test_hot_experts_on_one_device_are_slower_than_on_two() -> None:
    (stage,) = plan(*MIXTRAL, INVENTORY, workload(SKEWED)).stages

    def with_experts(own: tuple[int, ...], there: tuple[int, ...]) -> StagePlan:
        (helper,) = stage.helpers
        helpers = (replace(helper, experts=(there,) * 32),)
        return replace(stage, experts=(own,) * 32, helpers=helpers)

    def rate_of(own: tuple[int, ...], there: tuple[int, ...]) -> float:
        found = plan(*MIXTRAL, INVENTORY, workload(SKEWED))
        moved = with_stage(found, with_experts(own, there))
        return rate(predicted(moved, *MIXTRAL, INVENTORY, workload(SKEWED)))

    together, apart = rate_of((0, 1, 2, 3), (4, 5, 6, 7)), rate_of((0, 3, 5, 6), (1, 2, 4, 7))
    assert apart > 1.05 * together
    assert rate(plan(*MIXTRAL, INVENTORY, workload(SKEWED))) >= apart * (1 - 1e-9)


def test_a_copy_of_a_hot_expert_is_counted_where_it_helps() -> None:
    found = plan(*MIXTRAL, INVENTORY, workload(SKEWED))
    (stage,) = found.stages
    (helper,) = stage.helpers
    halves = replace(
        stage,
        experts=((0, 1, 2, 3),) * 32,
        helpers=(replace(helper, experts=((4, 5, 6, 7),) * 32),),
    )
    copied = replace(halves, helpers=(replace(helper, experts=((0, 1, 4, 5, 6, 7),) * 32),))
    rates = [
        rate(predicted(with_stage(found, each), *MIXTRAL, INVENTORY, workload(SKEWED)))
        for each in (halves, copied)
    ]
    assert rates[1] > rates[0]
