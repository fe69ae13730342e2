"""When lost pipelines are started again: the policy, and a keeper with a fake clock."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.deployment.health import NODE_PATIENCE_S, PipelineHealth, verdict
from magnetar.cluster.deployment.pipeline_keeper import WATCH_S, PipelineKeeper
from magnetar.cluster.deployment.restart_policy import (
    LOOP_FAILURES,
    MAX_DELAY_S,
    SECOND_DELAY_S,
    STEADY_S,
    Restarts,
    delay_s,
)
from magnetar.errors import InterruptedByUserError, MagnetarError, StageLostError


def test_the_first_start_comes_at_once_and_later_ones_ever_later() -> None:
    assert [delay_s(n) for n in range(10)] == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert delay_s(10**9) == MAX_DELAY_S


@given(
    lives=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1.0, STEADY_S - 1, STEADY_S, 10 * STEADY_S]),
            st.lists(st.integers(0, 1000), max_size=6),
        ),
        max_size=12,
    )
)
def test_failures_count_from_the_last_steady_time_and_delays_follow_them(
    lives: Sequence[tuple[float, Sequence[int]]],
) -> None:
    """Each life: how long it served, and how long each of the starts took that then failed."""
    now = 5.0
    restarts = Restarts(since_s=now)
    in_a_row = 0
    for number, (served_s, failed_starts) in enumerate(lives):
        assert (restarts.state, restarts.num_restarts) == ("up", number)
        now += served_s
        in_a_row = 1 if served_s >= STEADY_S else in_a_row + 1
        restarts = restarts.lost(now)
        for took_s in (*failed_starts, None):
            assert restarts.num_failures == in_a_row
            assert restarts.is_looping == (in_a_row >= LOOP_FAILURES)
            expected = 0 if in_a_row == 1 else SECOND_DELAY_S * 2 ** (in_a_row - 2)
            assert restarts.due_s == now + min(expected, MAX_DELAY_S)
            now = restarts.due_s
            restarts = restarts.begun(now)
            if took_s is not None:
                now += took_s
                in_a_row += 1
                restarts = restarts.lost(now)
        restarts = restarts.done(now)
        assert restarts.num_failures == in_a_row  # until it has served for long


@dataclass
class FakePipeline:
    """Lives as the script says; its clock moves only where somebody waits."""

    serves_s: list[float]
    """How long it serves each time before it is lost."""
    failing: list[bool] = field(default_factory=list)
    """Which starts fail, in order; later ones do not."""
    away: list[tuple[float, float]] = field(default_factory=list)
    """From when to when node h2 is away."""
    now: float = 0.0
    log: list[tuple[str, float]] = field(default_factory=list)
    health: list[PipelineHealth] = field(default_factory=list)
    is_clear: bool = False

    def lost(self, timeout_s: float) -> MagnetarError | None:
        if not self.serves_s:
            raise InterruptedByUserError("the script is over")
        if self.serves_s[0] > timeout_s:
            self.serves_s[0] -= timeout_s
            self.now += timeout_s
            return None
        self.now += self.serves_s.pop(0)
        self.is_clear = False
        self.log.append(("lost", self.now))
        return StageLostError("stage 1 died")

    def clear(self) -> None:
        self.is_clear = True

    def missing(self) -> tuple[str, ...]:
        return ("h2",) if any(begin <= self.now < end for begin, end in self.away) else ()

    def start(self) -> None:
        assert self.is_clear, "what is left must be ended first"
        assert not self.missing(), "there is nothing to start it on"
        self.log.append(("start", self.now))
        if self.failing and self.failing.pop(0):
            self.is_clear = False
            raise StageLostError("no memory")

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return False

    def keep(self) -> None:
        keeper = PipelineKeeper(
            0,
            self,
            on_change=self.health.append,
            stop=threading.Event(),
            clock=lambda: self.now,
            wait=self.wait,
        )
        keeper.run()


def test_a_pipeline_that_dies_once_is_started_at_once() -> None:
    pipeline = FakePipeline(serves_s=[100.0])
    pipeline.keep()
    assert [what for what, _ in pipeline.log] == ["lost", "start"]
    assert pipeline.log[0][1] == pytest.approx(100, abs=WATCH_S)
    assert pipeline.log[1][1] == pipeline.log[0][1]
    assert [each.state for each in pipeline.health] == ["waiting", "starting", "up"]
    assert [each.reason for each in pipeline.health] == [
        "PipelineLost",
        "PipelineLost",
        "Restarted",
    ]


def test_one_that_does_not_come_up_is_in_a_crash_loop_and_tried_ever_more_seldom() -> None:
    pipeline = FakePipeline(serves_s=[1.0], failing=[True] * 9)
    pipeline.keep()
    starts = [at for what, at in pipeline.log if what == "start"]
    gaps = [later - before for before, later in pairwise(starts)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    looping = [each for each in pipeline.health if each.is_looping]
    assert looping[0].num_failures == LOOP_FAILURES
    assert looping[0].message == (
        "again and again: stage 1 died; it did not come up: no memory; it is tried ever more seldom"
    )
    up = pipeline.health[-1]
    assert (up.state, up.reason, up.num_restarts, up.num_failures) == ("up", "Restarted", 1, 10)
    assert (up.cause, up.obstacle) == ("stage 1 died", "")


def test_one_that_comes_up_but_does_not_stay_is_in_a_crash_loop_too() -> None:
    pipeline = FakePipeline(serves_s=[5.0] * 4)
    pipeline.keep()
    lost = [each for each in pipeline.health if each.state == "waiting"]
    assert [each.reason for each in lost] == ["PipelineLost"] * 2 + ["CrashLoop"] * 2
    assert pipeline.health[-1].num_restarts == 4


def test_a_node_that_is_away_is_waited_for_and_is_no_failure() -> None:
    away = (2.0, 2.0 + NODE_PATIENCE_S + 30)
    pipeline = FakePipeline(serves_s=[2.0], away=[away])
    pipeline.keep()
    assert [each.reason for each in pipeline.health] == [
        *("PipelineLost", "NodeLost", "NodeGone", "PipelineLost", "Restarted"),
    ]
    assert "when h2 is back" in pipeline.health[1].message
    assert "h2 did not come back within 60 s" in pipeline.health[2].message
    assert pipeline.health[-1].num_failures == 1
    (started,) = (at for what, at in pipeline.log if what == "start")
    assert away[1] <= started < away[1] + 2


def test_the_end_of_the_deployment_ends_a_wait() -> None:
    pipeline = FakePipeline(serves_s=[1.0, 1.0])
    pipeline.wait = lambda seconds: True  # type: ignore[method-assign]
    pipeline.keep()
    assert [what for what, _ in pipeline.log] == ["lost"]


def health(number: int, **changes: object) -> PipelineHealth:
    return PipelineHealth(number=number, since="now", **changes)  # type: ignore[arg-type]


def test_what_pipelines_mean_together_is_as_grave_as_the_gravest() -> None:
    lost = health(1, state="waiting", cause="stage 0 of pipeline 1 died")
    looping = health(2, state="starting", cause="it is full", is_looping=True)
    told = verdict([health(0), lost, looping])
    assert (told.all_up, told.any_up, told.reason) == (False, True, "CrashLoop")
    assert told.message == (
        "2 of 3 pipelines lost, requests go to the others: "
        "pipeline 1: stage 0 of pipeline 1 died; it is being started again; "
        "pipeline 2: again and again: it is full; it is tried ever more seldom"
    )
    alone = verdict([health(0, state="waiting", cause="stage 1 died")])
    assert (alone.all_up, alone.any_up, alone.reason) == (False, False, "PipelineLost")
    assert alone.message == "stage 1 died; it is being started again"
    back = verdict([health(0, num_restarts=2, cause="stage 1 died"), health(1)])
    assert (back.all_up, back.any_up, back.reason) == (True, True, "Restarted")
    assert back.message == "pipeline 0: back after: stage 1 died (started again 2 times so far)"
    assert verdict([health(0)]).reason == "Serving"
