"""Conditions, failures and progress: what a controller tells."""

import pytest

from magnetar.cluster.deployment.progress_board import ProgressBoard
from magnetar.cluster.deployment.status import (
    PARTS,
    Condition,
    DeploymentStatus,
    Failure,
    with_condition,
    without_condition,
)
from magnetar.errors import DiskSpaceError, MagnetarError, TimedOutError
from magnetar.fetcher.progress import Progress


def all_true(now: str) -> tuple[Condition, ...]:
    conditions: tuple[Condition, ...] = ()
    for kind in PARTS:
        conditions = with_condition(conditions, kind, status=True, reason="Done", now=now)
    return conditions


def ready(conditions: tuple[Condition, ...]) -> Condition:
    return next(condition for condition in conditions if condition.type == "Ready")


def test_ready_is_the_and_of_all_parts() -> None:
    conditions = with_condition((), "SourceVerified", status=True, reason="Verified", now="1")
    assert not ready(conditions).status
    assert ready(all_true("1")).status


def test_a_lost_stage_makes_it_unready_with_the_reason() -> None:
    conditions = with_condition(
        all_true("1"),
        "StagesReady",
        status=False,
        reason="StageLost",
        message="stage 2 died",
        now="2",
    )
    assert (ready(conditions).status, ready(conditions).reason) == (False, "StageLost")
    assert ready(conditions).message == "stage 2 died"


def test_transition_times_move_only_with_the_status() -> None:
    conditions = with_condition(all_true("1"), "StagesReady", status=True, reason="Again", now="2")
    stages = next(condition for condition in conditions if condition.type == "StagesReady")
    assert (stages.reason, stages.last_transition_time) == ("Again", "1")
    assert ready(conditions).last_transition_time == "1"


@pytest.mark.parametrize("error", [DiskSpaceError("no room"), TimedOutError("too late")])
def test_an_error_keeps_its_class_and_exit_code_across_processes(error: MagnetarError) -> None:
    back = Failure.of(error).to_error()
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.exit_code == error.exit_code


def test_an_unexpected_error_keeps_its_type_in_the_message() -> None:
    back = Failure.of(KeyError("x")).to_error()
    assert type(back) is MagnetarError
    assert "KeyError" in str(back)


def test_a_class_that_is_no_error_of_ours_is_not_raised() -> None:
    assert type(Failure(error="Mapping", message="m").to_error()) is MagnetarError


def test_status_is_json() -> None:
    status = DeploymentStatus(name="a", model_name="m", epoch=1, conditions=all_true("1"))
    assert status.to_json()["ready"] is True
    assert status.to_json()["conditions"][0]["type"] == "SourceVerified"


def test_the_board_keeps_the_latest_reading_of_each_phase_and_node() -> None:
    board = ProgressBoard()
    board.publish(Progress(phase="download", node="a", done_bytes=1))
    board.publish(Progress(phase="download", node="b", done_bytes=2))
    board.publish(Progress(phase="download", node="a", done_bytes=3, finished=True))
    news, cursor = board.since(0)
    assert [(reading.node, reading.done_bytes) for reading in news] == [("b", 2), ("a", 3)]
    assert board.since(cursor) == ((), cursor)


def test_a_disk_without_room_is_told_and_changes_nothing_else() -> None:
    before = all_true("1")
    short = with_condition(
        before, "DiskHasRoom", status=False, reason="DiskFull", message="h1: paused", now="2"
    )
    assert ready(short).status
    assert [each.type for each in short][-2:] == ["DiskHasRoom", "Ready"]
    assert without_condition(short, "DiskHasRoom") == before
