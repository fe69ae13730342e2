"""Who computes what of one layer's step, where experts lie on several hosts. Pure."""

from collections.abc import Sequence
from typing import Final

SPLIT_ROWS: Final = 32
"""So many rows take about as long to multiply as their expert takes to read: copies of an expert
share more than that, and leave fewer to one of them, which alone then reads it."""


def divide(
    experts_A: Sequence[int], hosts_E: Sequence[Sequence[int]], *, num_hosts: int
) -> list[list[int]]:
    """For every host the positions in `experts_A` that are its own, ascending.

    `hosts_E` names the hosts of each expert by number, 0 being the home. Where there is a choice
    the least loaded host gets the rows, of equals the one with the lowest number; the same input
    is always divided alike.
    """
    asked: dict[int, list[int]] = {}
    for position, expert in enumerate(experts_A):
        asked.setdefault(expert, []).append(position)
    shares: list[list[int]] = [[] for _ in range(num_hosts)]
    load = [0] * num_hosts
    # Who has no choice comes first, then the larger ones, as always when packing.
    for expert in sorted(asked, key=lambda e: (len(hosts_E[e]), -len(asked[e]), e)):
        positions = asked[expert]
        num_parts = min(len(hosts_E[expert]), max(1, len(positions) // SPLIT_ROWS))
        chosen = sorted(hosts_E[expert], key=lambda host: (load[host], host))[:num_parts]
        for part, host in enumerate(chosen):
            rows = positions[part::num_parts]
            shares[host] += rows
            load[host] += SPLIT_ROWS + len(rows)
    for share in shares:
        share.sort()
    return shares
