"""Layouts as other systems choose them, on the places of a `Placing`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from magnetar.cluster.search.placing import Placing
from magnetar.cluster.search.problem import Problem

Chain = tuple[tuple[int, ...], tuple[int, ...]]
"""Sites in order and the end layer of each."""


def exo_ring(placing: Placing) -> list[Chain]:
    """Every node, layers in proportion to its memory."""
    problem = placing.problem(1)
    shares = {number: site.capacity for number, site in enumerate(problem.sites)}
    return _one(_proportional(problem, shares))


def uniform(placing: Placing) -> list[Chain]:
    """Every node, as many layers each as the others."""
    problem = placing.problem(1)
    return _one(_proportional(problem, dict.fromkeys(range(len(problem.sites)), 1.0)))


def by_speed(placing: Placing) -> list[Chain]:
    """Every node, layers in proportion to its speed in our own cost model, as far as they fit:
    water-filling with all that we know, which none of the others does."""
    problem = placing.problem(1)
    speeds = {n: 1 / float(site.seconds_L[-1]) for n, site in enumerate(problem.sites)}
    return _one(_proportional(problem, speeds))


def parallax(placing: Placing) -> list[Chain]:
    """Pipelines of few nodes, each water-filled by operations per second (Parallax).

    Its allocator, at the defaults of ``src/scheduling/layer_allocation.py``: of all numbers of
    pipelines k that fit the one with the most ``k^2 / stages``, built of the fewest nodes by the
    layers that they have room for; in each layers in proportion to TFLOPS, as far as they fit; the
    nodes that are left join one by one where least is held.
    """
    problem = placing.problem(1)
    rooms = {number: _room(problem, number) for number in range(len(problem.sites))}
    order = sorted((n for n in rooms if rooms[n]), key=lambda n: -rooms[n])
    held = np.zeros(problem.num_layers)
    ranges: dict[int, tuple[int, int]] = {}

    def join(site: int, start: int, end: int) -> None:
        ranges[site] = (start, end)
        held[start:end] += problem.sites[site].capacity / (end - start)

    for group in pipelines_of_few_nodes([rooms[site] for site in order], problem.num_layers):
        sites = [order[at] for at in group]
        chain = _proportional(
            problem, {n: placing.places[n].device.gemm_gflops or 0 for n in sites}
        )
        assert chain is not None
        for site, start, end in zip(chain[0], (0, *chain[1]), chain[1], strict=False):
            join(site, start, end)
    for site in order if ranges else ():
        if site not in ranges:
            start = int(held.argmin())
            join(site, start, min(start + rooms[site], problem.num_layers))
    return _chains(problem, ranges)


def pipelines_of_few_nodes(rooms: Sequence[int], num_layers: int) -> list[list[int]]:
    """Groups of nodes that hold all layers each, so many that the square of their number over the
    nodes they take is largest; none: they do not fit once."""
    most = min(len(rooms), sum(rooms) // num_layers)
    found = {k: _fewest_nodes(rooms, num_layers, k) for k in range(1, most + 1)}
    stages = {k: sum(map(len, groups)) for k, groups in found.items() if groups}
    if not stages:
        return []
    return found[max(stages, key=lambda k: k * k / stages[k])]


def _fewest_nodes(rooms: Sequence[int], num_layers: int, count: int) -> list[list[int]]:
    """So many groups of as few nodes as can be; none: they do not fit."""

    @cache
    def best(at: int, missing: tuple[int, ...], unbegun: int) -> tuple[float, tuple[int, ...]]:
        """Nodes from `at` on that the groups still take, and by node what its group lacked before
        it, all layers where it begins one; 0: it is not used."""
        if not missing and not unbegun:
            return 0, ()
        if at == len(rooms):
            return math.inf, ()
        number, path = best(at + 1, missing, unbegun)
        found = [(number, (0, *path))]
        for lacked in sorted({*missing, *([num_layers] if unbegun else [])}):
            begins = lacked == num_layers
            after = list(missing)
            if not begins:
                after.remove(lacked)
            if lacked > rooms[at]:
                after.append(lacked - rooms[at])
            number, path = best(at + 1, tuple(sorted(after)), unbegun - begins)
            found.append((number + 1, (lacked, *path)))
        return min(found, key=lambda each: each[0])

    number, path = best(0, (), count)
    groups: list[list[int]] = []
    lacks: list[int] = []
    for node, lacked in enumerate(path if number < math.inf else ()):
        if lacked == num_layers:
            groups.append([])
            lacks.append(num_layers)
        if lacked:
            at = lacks.index(lacked)
            groups[at].append(node)
            lacks[at] -= rooms[node]
    return groups


def petals(placing: Placing) -> list[Chain]:
    """Nodes join one by one and take the window that is served worst, as long as fits (Petals)."""
    problem = placing.problem(1)
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
    return _chains(problem, ranges)


def _chains(problem: Problem, ranges: dict[int, tuple[int, int]]) -> list[Chain]:
    """The quickest chain through the ranges of nodes, then the quickest of the other nodes."""
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


def _proportional(problem: Problem, shares: Mapping[int, float]) -> Chain | None:
    """Layers in proportion to the shares of sites, in their order, as far as each has room."""
    room = {site: _room(problem, site) for site in shares}
    counts = dict.fromkeys(shares, 0)
    for _ in range(problem.num_layers):
        free = [site for site in shares if counts[site] < room[site]]
        if not free:
            return None
        counts[max(free, key=lambda site: shares[site] / (counts[site] + 1))] += 1
    sites = tuple(site for site, count in counts.items() if count)
    return sites, tuple(itertools.accumulate(counts[site] for site in sites))


def _one(chain: Chain | None) -> list[Chain]:
    return [] if chain is None else [chain]
