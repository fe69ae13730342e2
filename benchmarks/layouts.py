"""Layouts as other systems choose them, on the sites of a placement problem."""

import itertools
from collections.abc import Sequence

import numpy as np

from magnetar.cluster.search.problem import Problem

Chain = tuple[tuple[int, ...], tuple[int, ...]]
"""Sites in order and the end layer of each."""


def exo_ring(problem: Problem) -> list[Chain]:
    """Every node, layers in proportion to its memory."""
    return _proportional(problem, [site.capacity for site in problem.sites])


def water_filling(problem: Problem) -> list[Chain]:
    """Every node, layers in proportion to its speed, as far as they fit (Parallax)."""
    return _proportional(problem, [1 / float(site.seconds_L[-1]) for site in problem.sites])


def uniform(problem: Problem) -> list[Chain]:
    """Every node, as many layers each as the others."""
    return _proportional(problem, [1.0] * len(problem.sites))


def petals(problem: Problem) -> list[Chain]:
    """Nodes join one by one and take the window that is served worst, as long as fits (Petals).

    Routes are what remains: the quickest chain of ranges, then the quickest of the other nodes.
    """
    num_layers = problem.num_layers
    served = np.zeros(num_layers)
    ranges: dict[int, tuple[int, int]] = {}
    for site in sorted(range(len(problem.sites)), key=lambda n: -problem.sites[n].capacity):
        length = min(_room(problem, site), num_layers)
        if length < 1:
            continue
        starts = range(num_layers - length + 1)
        start = min(starts, key=lambda at: (sorted(served[at : at + length]), at))
        ranges[site] = (start, start + length)
        served[start : start + length] += num_layers / problem.sites[site].seconds_L[-1] / length
    chains = []
    while (chain := _quickest(problem, ranges)) is not None:
        chains.append(chain)
        for site in chain[0]:
            del ranges[site]
    return chains


def _quickest(problem: Problem, ranges: dict[int, tuple[int, int]]) -> Chain | None:
    """A chain through the ranges with the least round trip; a range may be entered inside."""
    best: dict[tuple[int, int], tuple[float, Chain]] = {(0, -1): (0.0, ((), ()))}
    for at in range(problem.num_layers):
        for (layer, last), (cost, (sites, ends)) in sorted(best.items()):
            if layer != at:
                continue
            for site, (start, end) in ranges.items():
                if site in sites or not start <= at < end:
                    continue
                seconds = problem.sites[site].seconds_L
                more = float(seconds[end] - seconds[at])
                more += float(problem.hop_s[last, site]) if last >= 0 else 0.0
                found = (cost + more, ((*sites, site), (*ends, end)))
                if (end, site) not in best or found < best[end, site]:
                    best[end, site] = found
    whole = [found for (layer, _), found in best.items() if layer == problem.num_layers]
    return min(whole)[1] if whole else None


def _room(problem: Problem, number: int) -> int:
    site = problem.sites[number]
    layer = float(site.needs_L[-1]) / problem.num_layers
    return int(max(0.0, site.capacity - site.first_bytes - site.last_bytes) // layer)


def _proportional(problem: Problem, shares: Sequence[float]) -> list[Chain]:
    """Layers in proportion to shares as far as each site has room, in the order of the sites."""
    room = [_room(problem, number) for number in range(len(shares))]
    counts = [0] * len(shares)
    for _ in range(problem.num_layers):
        free = [i for i in range(len(shares)) if counts[i] < room[i]]
        if not free:
            return []
        counts[max(free, key=lambda i: shares[i] / (counts[i] + 1))] += 1
    sites = tuple(number for number, count in enumerate(counts) if count)
    return [(sites, tuple(itertools.accumulate(counts[number] for number in sites)))]
