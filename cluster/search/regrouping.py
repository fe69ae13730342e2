"""Divide many devices among pipelines: from a few good partitions by small steps. Deterministic.

Partitions to start from have groups of equal speed, of neighbours, and of devices that hold the
whole model by themselves. A step moves a device, exchanges two, shifts streams, joins two groups
or cuts one in two; it is kept when the guess of `sketch.py` rises. A budget of guesses ends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations

import numpy as np

from .ceiling import numbers
from .division import Share
from .problem import Matrix
from .sketch import Sketch

Groups = tuple[int, ...]
"""Of devices, as bit masks."""
_COUNTS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
"""Of pipelines that are tried, and the most that there may be."""
_FEW = 16
"""Devices up to which a guess takes no time to speak of."""
_STARTS = 3
"""Partitions that are improved, of those that promise most."""


def regrouped(
    sketch: Sketch,
    num_sites: int,
    streams: int,
    *,
    most_pipelines: int,
    num_pipelines: int | None = None,
    guesses: int,
) -> list[tuple[Share, ...]]:
    """Divisions into two pipelines or more, the most promising first; none: nothing fits.

    About so many `guesses` are made where there are few devices, and fewer where there are many.
    """
    most = min(most_pipelines, num_sites, streams)
    counts = [n for n in {*_COUNTS, most} if 2 <= n <= most]
    if num_pipelines is not None:
        counts = [num_pipelines] if 2 <= num_pipelines <= min(num_sites, streams) else []
    starts = {
        groups: _shares(sketch, groups, streams)
        for count in sorted(counts)
        for groups in _starts(sketch, num_sites, count)
        if all(groups)
    }
    ranked = sorted(starts.values(), key=lambda each: -_score(sketch, each))
    guesses = guesses * min(_FEW, num_sites) // num_sites // _STARTS
    risen = [
        _climbed(sketch, start, guesses, is_free=num_pipelines is None)
        for start in ranked[:_STARTS]
    ]
    found = dict.fromkeys([*risen, *ranked])
    return sorted(
        (each for each in found if _score(sketch, each) > 0 and len(each) > 1),
        key=lambda each: -_score(sketch, each),
    )


def _score(sketch: Sketch, shares: Sequence[Share]) -> float:
    """0 where one of them does not fit."""
    each = [sketch.yields(share) for share in shares]
    return sum(each) if all(each) else 0.0


def _shares(sketch: Sketch, groups: Groups, streams: int) -> tuple[Share, ...]:
    """Streams in proportion to speed, one at least for each."""
    speed_N = sketch.speed_N()
    speeds = np.array([speed_N[list(numbers(group))].sum() for group in groups])
    if not sketch.is_busy:
        speeds[:] = 1.0
    whole = np.maximum(1, np.floor(streams * speeds / speeds.sum())).astype(int)
    while whole.sum() > streams:
        whole[whole.argmax()] -= 1
    while whole.sum() < streams:
        whole[(speeds / whole).argmax()] += 1
    return tuple(Share(group, int(count)) for group, count in zip(groups, whole, strict=True))


def _starts(sketch: Sketch, num_sites: int, count: int) -> Iterator[Groups]:
    speed_N = sketch.speed_N()
    by_speed = [int(n) for n in np.argsort(-speed_N, kind="stable")]
    yield _balanced(by_speed, speed_N, count)
    room_N = np.minimum(sketch.room_N(1), 1e9)
    by_room = [int(n) for n in np.argsort(-room_N, kind="stable")]
    yield _balanced(by_room, room_N + 1e-9, count)
    chain = _neighbours(sketch, by_speed[0])
    for weight_N in (speed_N, room_N + 1e-9):
        yield _cut(chain, weight_N, count)
    # The fastest ones alone, where they hold the model, and the others together.
    yield (*(1 << n for n in by_room[: count - 1]), sum(1 << n for n in by_room[count - 1 :]))


def _balanced(order: Sequence[int], weight_N: Matrix, count: int) -> Groups:
    """The heaviest first, each to the group that is lightest so far."""
    groups, weights = [0] * count, [0.0] * count
    for number in order:
        at = min(range(count), key=lambda n: (weights[n], n))
        groups[at] |= 1 << number
        weights[at] += float(weight_N[number])
    return tuple(groups)


def _neighbours(sketch: Sketch, start: int) -> list[int]:
    """All sites, each followed by the nearest of those that are left."""
    order, left = [start], [n for n in range(len(sketch.hop_s)) if n != start]
    while left:
        near = min(left, key=lambda n: (sketch.hop_s[order[-1], n], n))
        order.append(near)
        left.remove(near)
    return order


def _cut(order: Sequence[int], weight_N: Matrix, count: int) -> Groups:
    """Consecutive groups of about the same weight, none empty."""
    sums = list(accumulate(float(weight_N[n]) for n in order))
    groups = [0] * count
    for position, number in enumerate(order):
        at = min(count - 1, int(count * (sums[position] - weight_N[number] / 2) / sums[-1]))
        at = max(at, count - (len(order) - position))  # one is left for each group to come
        groups[min(at, position)] |= 1 << number
    return tuple(groups)


def _climbed(
    sketch: Sketch, start: tuple[Share, ...], guesses: int, *, is_free: bool
) -> tuple[Share, ...]:
    """The end of a climb that takes every step up at once."""
    best, score, is_rising = start, _score(sketch, start), True
    while is_rising and guesses > 0:
        is_rising = False
        for step in _steps(sketch, best, is_free=is_free):
            guesses -= 1
            then = _score(sketch, step)
            if then > score * (1 + 1e-9):
                best, score, is_rising = step, then, True
                break
            if guesses <= 0:
                break
    return best


def _steps(
    sketch: Sketch, shares: tuple[Share, ...], *, is_free: bool
) -> Iterator[tuple[Share, ...]]:
    streams = sum(share.streams for share in shares)
    groups = [share.sites for share in shares]
    pairs = list(combinations(range(len(groups)), 2))

    def parted(changed: dict[int, int], *, also: Groups = ()) -> tuple[Share, ...]:
        kept = (changed.get(at, group) for at, group in enumerate(groups))
        return _shares(sketch, (*(group for group in kept if group), *also), streams)

    if is_free:
        for a, b in pairs:
            yield parted({a: groups[a] | groups[b], b: 0})
        for at, group in enumerate(groups):
            if group.bit_count() > 1 and len(groups) < streams:
                own = sorted(numbers(group), key=lambda n: -sketch.speed_N()[n])
                half = sum(1 << n for n in own[::2])
                yield parted({at: half}, also=(group & ~half,))
    for a, b in pairs:
        for source, target in ((a, b), (b, a)):
            if groups[source].bit_count() > 1:
                for number in numbers(groups[source]):
                    bit = 1 << number
                    yield parted({source: groups[source] & ~bit, target: groups[target] | bit})
            if shares[source].streams > 1:
                moved = list(shares)
                count = max(1, shares[source].streams // 8)
                moved[source] = Share(groups[source], shares[source].streams - count)
                moved[target] = Share(groups[target], shares[target].streams + count)
                yield tuple(moved)
        for one in numbers(groups[a]):
            for other in numbers(groups[b]):
                both = 1 << one | 1 << other
                if groups[a].bit_count() > 1 or groups[b].bit_count() > 1:
                    yield parted({a: groups[a] ^ both, b: groups[b] ^ both})
