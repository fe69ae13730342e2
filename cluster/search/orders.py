"""Orders of sites along which routes are looked for where all orders would be too many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .problem import Problem


def likely_orders(problem: Problem, useful: Sequence[int]) -> Iterator[list[int]]:
    """Of sites that may have a stage: by speed, both ways, and along short links from the fastest
    ones."""
    speed = [float(site.seconds_L[-1]) for site in problem.sites]
    by_speed = sorted(useful, key=lambda number: (speed[number], number))
    orders = [by_speed, by_speed[::-1]]
    for start in by_speed[:2]:
        order, left = [start], [number for number in by_speed if number != start]
        while left:
            near = min(left, key=lambda j: (problem.hop_s[order[-1], j], speed[j], j))
            order.append(near)
            left.remove(near)
        orders.append(order)
    return (_with_pins(problem, order) for order in orders)


def _with_pins(problem: Problem, order: list[int]) -> list[int]:
    """Sites that must hold certain layers stand where these are, the others in their order."""
    spans = {site: problem.sites[site].span for site in order}
    others = [site for site in order if spans[site] is None]
    if len(others) == len(order):
        return order
    place = {site: (number + 0.5) / len(others) for number, site in enumerate(others)}
    for site, span in spans.items():
        if span is not None:
            ends = {0: -1.0, problem.num_layers: 2.0}
            middle = (span[0] + span[1]) / 2 / problem.num_layers
            place[site] = ends.get(span[0], ends.get(span[1], middle))
    return sorted(order, key=lambda site: place[site])
