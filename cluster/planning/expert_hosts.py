"""Which experts of a stage lie where: numbers of experts per host become experts, by popularity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import factorial, prod

import numpy as np

from ..search.cost import ModelCost
from ..search.expert_cost import Array, Seat, hosts_s, token_weights

HOT = 1.25
"""Times the mean load of an expert, from which on a copy of it is worth its memory."""
_MOST_WAYS = 700


def choose_experts(
    cost: ModelCost,
    layer: int,
    seats: Sequence[Seat],
    counts_H: Sequence[int],
    *,
    tokens: int,
    popularity: Sequence[float] | None,
) -> list[list[int]]:
    """The experts of each host, ascending: so many of them that the slowest is done earliest.

    Without popularity all are alike, and each host has the next ones.
    """
    if popularity is None or cost.num_experts > 12:
        return _in_turn(range(cost.num_experts), counts_H)
    weights = token_weights(tuple(popularity), cost.experts_per_token)
    ways = [_dealt(popularity, counts_H)]
    if factorial(cost.num_experts) // prod(map(factorial, counts_H)) <= _MOST_WAYS:
        ways = list(_ways(list(range(cost.num_experts)), counts_H))
    held_OHE = np.zeros((len(ways), len(seats), cost.num_experts), dtype=np.int64)
    for option, way in enumerate(ways):
        for host, experts in enumerate(way):
            held_OHE[option, host, experts] = 1
    seconds_O: Array = hosts_s(cost, layer, seats, held_OHE, tokens=tokens, weights=weights)
    return ways[int(seconds_O.argmin())]


def add_copies(
    held: list[list[int]],
    rooms: list[int],
    seats: Sequence[Seat],
    popularity: Sequence[float],
) -> list[list[int]]:
    """A layer's experts with copies of its hot ones on hosts that have room, which shrinks.

    Rows go to the least loaded holder, whatever its speed; so only hosts that read no slower than
    the first holder get copies.
    """
    mean = sum(popularity) / len(popularity)
    copied = [list(experts) for experts in held]
    for expert in sorted(range(len(popularity)), key=lambda e: (-popularity[e], e)):
        if popularity[expert] < HOT * mean:
            break
        home = next(host for host, experts in enumerate(held) if expert in experts)
        speed = seats[home].speed.read_gbps
        for host in range(len(held)):
            quick = seats[host].speed.read_gbps >= speed * 0.95
            if host != home and quick and rooms[host] > 0 and copied[host]:
                copied[host] = sorted([*copied[host], expert])
                rooms[host] -= 1
    return copied


def _in_turn(experts: Sequence[int], counts_H: Sequence[int]) -> list[list[int]]:
    order = iter(experts)
    return [[next(order) for _ in range(count)] for count in counts_H]


def _dealt(popularity: Sequence[float], counts_H: Sequence[int]) -> list[list[int]]:
    """Each expert, the hottest first, to the host whose load per expert to come is least."""
    found: list[list[int]] = [[] for _ in counts_H]
    for expert in sorted(range(len(popularity)), key=lambda e: (-popularity[e], e)):
        open_hosts = [host for host, count in enumerate(counts_H) if len(found[host]) < count]
        load = {h: sum(popularity[e] for e in found[h]) / counts_H[h] for h in open_hosts}
        found[min(open_hosts, key=lambda host: (load[host], host))].append(expert)
    return [sorted(experts) for experts in found]


def _ways(experts: list[int], counts_H: Sequence[int]) -> Iterator[list[list[int]]]:
    if not counts_H:
        yield []
        return
    for chosen in combinations(experts, counts_H[0]):
        rest = [expert for expert in experts if expert not in chosen]
        for others in _ways(rest, counts_H[1:]):
            yield [list(chosen), *others]
