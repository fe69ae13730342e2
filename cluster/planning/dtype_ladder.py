"""Which devices hold weights in which dtype: as stored where that fits, then the least loss."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from ..machines import ComputeDtype

LADDER: tuple[ComputeDtype, ...] = ("fp32", "bf16", "int8", "int4")
"""From most to least quality; fp16 stands beside bf16."""
_MOST_SUBSETS_OF = 8
"""Devices up to which every subset is a choice; of more, the largest or the smallest ones."""
_MOST_TRIED = 12
"""Choices of one rung, the best ones."""


def lower_dtypes(dtype: ComputeDtype) -> tuple[ComputeDtype, ...]:
    """Those of less quality, the next one first."""
    return LADDER[LADDER.index("bf16" if dtype == "fp16" else dtype) + 1 :]


def dtype_choices(
    room: Mapping[ComputeDtype, Sequence[int]], num_layers: int
) -> Iterator[tuple[ComputeDtype, ...]]:
    """A dtype for every device, the least loss first: rung by rung, and on each rung first the
    choices that lower the fewest layers.

    `room` says how many layers fit on each device, by dtype, in the order of the ladder. Choices
    that cannot hold the model are passed over.
    """
    dtypes = list(room)
    count = len(room[dtypes[0]])
    if sum(room[dtypes[0]]) >= num_layers:
        yield (dtypes[0],) * count
    for upper, lower in pairwise(dtypes):
        choices = []
        # Stages with different hidden states cannot follow each other; in 8 and 4 bits it is bf16.
        subsets = _subsets(room[upper]) if upper in ("bf16", "int8") else [frozenset(range(count))]
        for lowered in subsets:
            kept = sum(room[upper][n] for n in range(count) if n not in lowered)
            if kept + sum(room[lower][n] for n in lowered) >= num_layers:
                choices.append((num_layers - kept, len(lowered), sorted(lowered)))
        choices.sort()
        # The last one lowers most: where nearly nothing else fits, it does.
        for _, _, chosen in choices[:_MOST_TRIED] + choices[_MOST_TRIED:][-1:]:
            yield tuple(lower if n in chosen else upper for n in range(count))


def _subsets(room: Sequence[int]) -> Iterator[frozenset[int]]:
    count = len(room)
    if count <= _MOST_SUBSETS_OF:
        for size in range(1, count + 1):
            yield from map(frozenset, combinations(range(count), size))
        return
    by_room = sorted(range(count), key=lambda n: (room[n], n))
    for order in (by_room, by_room[::-1]):
        for size in range(1, count + 1):
            yield frozenset(order[:size])
