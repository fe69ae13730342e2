"""Rounds of a benchmark between measurements of the machine, and which of them tell anything.

Memory that other guests of a host share may be twice as fast a minute later. A round says how good
a prediction is only if the machine was the same before and after it, and if what was measured had
the processors to itself. Both are looked at, never at what the round found; rounds go on until
enough of them are steady.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from magnetar.benchmarks.rounds_gauge import Moment, RoundsGauge
from magnetar.cluster.inventory.other_work import OtherWork

CHANGE = 0.1
"""Share by which the predictions before and after a steady round differ at most."""
OTHERS = 0.1
"""Share of the processors that other work took in a steady round, at most."""
SPENT_S = 60.0
"""Seconds after which no round begins any more."""

Predict = Callable[[Moment], Mapping[str, float]]
"""Seconds of a step by case, on a machine as it was then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one round saw."""

    before_s: Mapping[str, float]
    after_s: Mapping[str, float]
    """Predicted for the machine as it was before and after, by case."""
    seen_s: Mapping[str, float]
    others_share: float
    """Of the processors, that other work took meanwhile."""
    plain_gbps: tuple[float, float]
    gauge_gbps: tuple[float, float]
    """Before and after."""

    def told_s(self, case: str) -> float:
        """Predicted for the machine between both sides."""
        return (self.before_s[case] + self.after_s[case]) / 2

    def ratio(self, case: str) -> float:
        """Predicted over measured."""
        return self.told_s(case) / self.seen_s[case]

    @property
    def left_out(self) -> str | None:
        """Why it does not count; None where it does."""
        change = max(
            abs(self.after_s[case] - told_s) / min(told_s, self.after_s[case])
            for case, told_s in self.before_s.items()
        )
        if change > CHANGE:
            return f"the machine changed by {change:.0%}"
        if self.others_share > OTHERS:
            return f"other work took {self.others_share:.0%} of the processors"
        return None


def rounds_of(
    gauge: RoundsGauge,
    predict: Predict,
    measure: Callable[[], Mapping[str, float]],
    *,
    enough: int,
    most: int,
) -> list[Round]:
    """All rounds until `enough` are steady, `most` were made or `SPENT_S` passed."""
    found: list[Round] = []
    began, before = time.monotonic(), gauge.measure()
    while (
        sum(each.left_out is None for each in found) < enough
        and len(found) < most
        and time.monotonic() - began < SPENT_S
    ):
        others = OtherWork()
        seen_s = measure()
        others_share = others.share()
        after = gauge.measure()
        found.append(
            Round(
                before_s=predict(before),
                after_s=predict(after),
                seen_s=seen_s,
                others_share=others_share,
                plain_gbps=(before.plain_gbps, after.plain_gbps),
                gauge_gbps=(before.gauge_gbps, after.gauge_gbps),
            )
        )
        before = after
    return found


def steady(rounds: Sequence[Round]) -> list[Round]:
    """Those that count."""
    return [each for each in rounds if each.left_out is None]


def median_ratio(rounds: Sequence[Round], case: str) -> float:
    """Predicted over measured."""
    return statistics.median(each.ratio(case) for each in rounds)
