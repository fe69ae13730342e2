"""How long the cases of a run may take."""

import math
import time
from dataclasses import replace

from magnetar.benchmarks.peers.runner import Task

CASE_S = 75.0
"""The rounds of a case take no longer, unless two do."""
QUICK_S = 300.0
"""All cases of a quick run: what is left is divided evenly over those to come."""


class Clock:
    """How long the rounds of a case may take; a quick run has an end, and short tasks."""

    def __init__(self, num_cases: int, *, quick: bool) -> None:
        self.quick = quick
        self._num_left = num_cases
        self._ends = time.monotonic() + QUICK_S if quick else math.inf

    def begin(self) -> bool:
        """One more case; False when there is no time left for it."""
        self._num_left -= 1
        return time.monotonic() < self._ends

    def case_s(self) -> float:
        """For all rounds of the case, once its engines are loaded."""
        left_s = max(0.0, self._ends - time.monotonic())
        return min(CASE_S, left_s / (self._num_left + 1))

    def task(self, task: Task) -> Task:
        """As it is, or half as long."""
        return replace(task, num_tokens=-(-task.num_tokens // 2)) if self.quick else task
