"""What routes yield in the closed loop that they are for: steps, one after another, on all stages.

The score of a route spreads prompts evenly over all steps. Really a prompt comes whole: its steps
are longer than the others, stages behind them wait, and while it is read its stream makes no token.
Here micro-batches go round and round. Each step takes every stage its time, begins when the stage
is free and the step has come, and has the next piece of the prompts that are due. Prompts have all
the same length and come evenly with what is generated, so that this is deterministic.

    C  runs, of different routes or sizes of steps      S  stages, as many as the longest has
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .expert_cost import Array
from .mix import PROMPT_TOKENS

_PROMPT = 256
"""Tokens of a prompt."""
_WARM, _STEPS = 128, 512
"""Steps that do not count, and all: at least one prompt comes between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A route, and the steps that go round on it."""

    streams: int
    micro_batches: int
    sequences: int
    """Decoded in a step at most."""
    size: int
    """Tokens of a full step."""
    calm_s: Sequence[float]
    """Of each stage in a step without prompts."""
    full_s: Sequence[float]
    """The same in a full one."""
    calm_ways_s: Sequence[float]
    """From each stage to the next, and at last back to the scheduler."""
    full_ways_s: Sequence[float]


def loop_tokens_per_s(runs: Sequence[Run]) -> list[float]:
    """Tokens generated per second on each route."""
    most = max(len(run.calm_s) for run in runs)
    calm_CS, full_CS = (_padded([getattr(r, n) for r in runs], most) for n in ("calm_s", "full_s"))
    ways_CS, full_ways_CS = (
        _padded([getattr(r, n) for r in runs], most, last=True)
        for n in ("calm_ways_s", "full_ways_s")
    )
    # From the first stage on, were nobody in the way: when each is done, and when it begins.
    done_CS, full_done_CS = (
        np.cumsum(stages + ways, axis=1) - ways
        for stages, ways in ((calm_CS, ways_CS), (full_CS, full_ways_CS))
    )
    begun_CS, more_done_CS = done_CS - calm_CS, full_done_CS - done_CS
    more_begun_CS = full_done_CS - full_CS - begun_CS
    way_C, more_way_C = ways_CS[:, -1], full_ways_CS[:, -1] - ways_CS[:, -1]
    streams_C = np.array([run.streams for run in runs], dtype=float)
    batches_C = np.array([run.micro_batches for run in runs])
    room_C = np.array([max(run.size - run.sequences, run.size // 4) for run in runs], dtype=float)
    every_C = np.arange(len(runs))
    back_KC = np.zeros((_STEPS + int(batches_C.max()), len(runs)))
    ends_CS = np.zeros_like(calm_CS)
    due_C, made_C, waiting_C, began_C, first_C = (np.zeros(len(runs)) for _ in range(5))
    for step in range(_STEPS):
        # A stream whose prompt is not read yet makes no token.
        decoded_C = np.maximum(0.0, streams_C - np.ceil(waiting_C / _PROMPT)) / batches_C
        made_C += decoded_C
        due_C += decoded_C * PROMPT_TOKENS
        comes_C = due_C >= _PROMPT
        if comes_C.any():
            due_C[comes_C] -= _PROMPT
            waiting_C[comes_C] += _PROMPT
        read_C = np.minimum(waiting_C, room_C)
        waiting_C -= read_C
        share_C = read_C / room_C
        share_C1 = share_C[:, None]
        ends_CS[:, 0] = np.maximum(ends_CS[:, 0], back_KC[step - batches_C, every_C])
        ends_CS -= begun_CS + share_C1 * more_begun_CS
        np.maximum.accumulate(ends_CS, axis=1, out=ends_CS)
        ends_CS += done_CS + share_C1 * more_done_CS
        back_KC[step] = ends_CS[:, -1] + way_C + share_C * more_way_C
        if step == _WARM:
            began_C, first_C = back_KC[step].copy(), made_C.copy()
    found: list[float] = ((made_C - first_C) / (back_KC[_STEPS - 1] - began_C)).tolist()
    return found


def _padded(rows: Sequence[Sequence[float]], length: int, *, last: bool = False) -> Array:
    """Zeros behind each, or before what is last."""
    found = np.zeros((len(rows), length))
    for at, row in enumerate(rows):
        found[at, : len(row) - last] = row[: len(row) - last]
        if last:
            found[at, -1] = row[-1]
    return found
