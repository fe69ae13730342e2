"""The contract of a plan's experts, and the plan as JSON."""

import json
import re
from dataclasses import replace

import pytest

from magnetar.cluster.plan import ExpertHost, ExpertIds, Pipeline, Plan, StagePlan, check_experts
from magnetar.cluster.planning.plan_view import plan_json
from magnetar.errors import InfeasiblePlanError

HELPER = ExpertHost(
    host="b",
    device="cpu",
    num_threads=2,
    weights_bytes=2,
    free_bytes=1,
    experts=((2, 3), (1, 3)),
)
STAGE = StagePlan(
    index=0,
    host="a",
    device="cpu",
    first_layer=4,
    end_layer=6,
    has_embeddings=False,
    has_output=False,
    dtype="bf16",
    num_threads=2,
    weights_bytes=4,
    kv_bytes=1,
    free_bytes=1,
    experts=((0, 1), (0, 1, 2)),
    helpers=(HELPER,),
)


def plan_of(stage: StagePlan) -> Plan:
    pipeline = Pipeline(stages=(stage,), num_kv_blocks=1, max_concurrency=1)
    return Plan(pipelines=(pipeline,), max_context_tokens=16)


def with_helper(experts: ExpertIds) -> Plan:
    return plan_of(replace(STAGE, helpers=(replace(HELPER, experts=experts),)))


def test_an_expert_on_two_devices_is_a_replica() -> None:
    check_experts(plan_of(STAGE), 4)
    assert STAGE.holders(4, 1) == (-1,)
    assert STAGE.holders(4, 2) == (0,)
    assert STAGE.holders(5, 1) == (-1, 0)


def test_a_stage_without_helpers_holds_every_expert() -> None:
    alone = replace(STAGE, experts=None, helpers=())
    check_experts(plan_of(alone), 4)
    assert alone.holders(5, 3) == (-1,)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (((2,), (3,)), "nobody holds expert 3 of layer 4"),
        (((3, 2), (3,)), "experts (3, 2) of layer 4; they must be ascending"),
        (((2, 3), (3, 3)), "experts (3, 3) of layer 5"),
        (((2, 3), (3, 4)), "each less than 4"),
        (((2, 3),), "experts of 1 layers, the stage has 2"),
    ],
)
def test_experts_that_break_the_contract_are_named(experts: ExpertIds, message: str) -> None:
    with pytest.raises(InfeasiblePlanError, match=re.escape(message)):
        check_experts(with_helper(experts), 4)


def test_a_helper_is_another_device_than_its_stage() -> None:
    twice = replace(STAGE, helpers=(replace(HELPER, host="a"),))
    with pytest.raises(InfeasiblePlanError, match="names a device twice"):
        check_experts(plan_of(twice), 4)


def test_helpers_are_in_the_json() -> None:
    (pipeline,) = json.loads(json.dumps(plan_json(plan_of(STAGE))))["pipelines"]
    (stage,) = pipeline["stages"]
    assert stage["experts"] == [[0, 1], [0, 1, 2]]
    (helper,) = stage["helpers"]
    assert (helper["host"], helper["experts"]) == ("b", [[2, 3], [1, 3]])
