"""Which rounds of the calibration count: never by what they found."""

from collections.abc import Mapping
from typing import Any, cast

import pytest

from magnetar.benchmarks import steady_rounds
from magnetar.benchmarks.rounds_gauge import Moment, RoundsGauge
from magnetar.benchmarks.steady_rounds import Round, median_ratio, rounds_of, steady
from magnetar.cluster.inventory.other_work import OtherWork
from magnetar.cluster.machines import Node


class Gauge:
    """A machine whose memory is as fast as it is told, one measurement after the other."""

    def __init__(self, *gbps: float) -> None:
        self._gbps = list(gbps)

    def measure(self) -> Moment:
        gbps = self._gbps.pop(0) if len(self._gbps) > 1 else self._gbps[0]
        node = Node(host="h", address="", num_cpus=1, devices=())
        return Moment(node=node, gauge_gbps=gbps, both_gbps=gbps / 2, plain_gbps=gbps)


def predict(seen: Moment) -> dict[str, float]:
    return {"step": 1.0 / seen.gauge_gbps}


def rounds(*gbps: float, seen_s: float = 0.05, enough: int = 2, most: int = 6) -> list[Round]:
    gauge = cast("RoundsGauge", Gauge(*gbps))
    return rounds_of(gauge, predict, lambda: {"step": seen_s}, enough=enough, most=most)


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherWork, "share", lambda _: 0.0)


def test_rounds_end_when_enough_were_steady() -> None:
    found = rounds(20.0)
    assert len(found) == 2
    assert median_ratio(found, "step") == pytest.approx(1.0)


def test_a_round_in_which_the_machine_changed_is_left_out() -> None:
    found = rounds(20.0, 30.0, 30.0, 31.0)
    assert [each.left_out for each in found] == ["the machine changed by 50%", None, None]
    assert steady(found) == found[1:]


def test_a_round_beside_other_work_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherWork, "share", lambda _: 0.25)
    found = rounds(20.0, most=3)
    assert [each.left_out for each in found] == 3 * ["other work took 25% of the processors"]


@pytest.mark.parametrize("seen_s", [1e-6, 0.05, 1e3])
def test_no_round_is_left_out_for_its_result(seen_s: float) -> None:
    assert len(steady(rounds(20.0, seen_s=seen_s))) == 2


def test_rounds_end_where_the_machine_is_never_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    wild = [10.0, 20.0] * 10
    assert len(rounds(*wild, most=5)) == 5
    monkeypatch.setattr(steady_rounds, "SPENT_S", 0.0)
    assert rounds(*wild) == []


def test_a_round_is_told_for_the_machine_between_both_sides() -> None:
    about: Mapping[str, Any] = {
        "seen_s": {"step": 2.0},
        "others_share": 0.0,
        "plain_gbps": (1.0, 1.0),
        "gauge_gbps": (1.0, 1.0),
    }
    found = Round(before_s={"step": 1.0}, after_s={"step": 1.08}, **about)
    assert found.ratio("step") == pytest.approx(0.52)
    assert found.left_out is None
