"""Cut a chain of layers into consecutive stages: exact, small, deterministic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A device and how many consecutive stages share its memory."""

    num_stages: int
    capacity: int
    """Memory for the layers of all its stages together."""


def partition(
    cost: Sequence[int], need: Sequence[int], seats: Sequence[Seat]
) -> tuple[int, ...] | None:
    """The cut whose costliest stage is cheapest, and among those the most even one.

    Layer l costs ``cost[l]`` (time) and takes ``need[l]`` (memory). Stages take the seats in
    order, every stage has at least one layer. Among equals the earliest cuts win.

    Returns the end layer of every stage, or None when no cut fits. A dynamic programme over
    (first layer of the seat, end layer): O(L^2) a stage, O(L^3) where stages share a seat.
    """
    largest = _cut(cost, need, seats, limit=sum(cost), merge=max)
    if largest is None:
        return None
    even = _cut(cost, need, seats, limit=largest[0], merge=lambda total, c: total + c * c)
    assert even is not None
    return even[1]


def _cut(
    cost: Sequence[int],
    need: Sequence[int],
    seats: Sequence[Seat],
    *,
    limit: int,
    merge: Callable[[int, int], int],
) -> tuple[int, tuple[int, ...]] | None:
    """Minimise the merged stage costs over cuts whose stages cost at most `limit`."""
    num_layers = len(cost)
    costs = [0, *accumulate(cost)]
    needs = [0, *accumulate(need)]
    stages_left = sum(seat.num_stages for seat in seats)
    # By (first layer of the present seat, end layer so far): score and ends of the best cut.
    best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, 0): (0, ())}
    for seat in seats:
        seated: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
        for (_, end), found in best.items():
            seated[end, end] = min(found, seated.get((end, end), found))
        best = seated
        for _ in range(seat.num_stages):
            stages_left -= 1
            grown: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
            for (first, start), (score, ends) in best.items():
                lowest = start + 1 if stages_left else num_layers
                for end in range(max(lowest, start + 1), num_layers - stages_left + 1):
                    stage_cost = costs[end] - costs[start]
                    if stage_cost > limit or needs[end] - needs[first] > seat.capacity:
                        break
                    candidate = (merge(score, stage_cost), (*ends, end))
                    if candidate < grown.get((first, end), (candidate[0] + 1, ())):
                        grown[first, end] = candidate
            best = grown
    return min((found for (_, end), found in best.items() if end == num_layers), default=None)
