"""The best routes of one placement at several numbers of sequences per step.

How many micro-batches the streams are cut into is tried from outside: each number is a search of
its own, cut short by what the others found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from .problem import Problem, Route
from .search import Least, Search

Found = tuple[Search, Route]
"""A route with the search that found it."""
_LEVEL = 0.93
_NUM_LEVELS = 12


def busiest(
    problems: Iterable[Problem], *, num_stages: int | None = None, floor: float = 0.0
) -> tuple[Problem, Route] | None:
    """The most tokens per second, with the problem it was found for. None: nothing fits, or has
    more than `floor`.

    `problems` are one placement at several numbers of sequences per step. Each is a search of its
    own, cut short by what the others found.
    """
    searches = [Search(problem) for problem in problems]
    found = contenders(searches, num_stages=num_stages, floor=floor)
    return (found[0][0].problem, found[0][1]) if found else None


def contenders(
    searches: Sequence[Search],
    *,
    num_stages: int | None = None,
    within: float = 0.0,
    floor: float = 0.0,
) -> list[Found]:
    """The best route of every search that has one `within` a share of the best of all, which is
    the first of them. Where the best has no more than `floor`, there may be none."""
    best: dict[int, tuple[float, Route]] = {}

    def least(number: int) -> float:
        most = max((floor, *(score for score, _ in best.values()))) * (1 - within)
        return max(most, best[number][0] if number in best else 0.0)

    def offer(number: int, routes: Iterable[Route]) -> None:
        for route in routes:
            best[number] = (route.tokens_per_s(searches[number].problem), route)

    def along(search: Search) -> Least:
        return lambda limit, below: search.along_orders(limit, below, num_stages)

    def over(search: Search) -> Least:
        return lambda limit, below: search.over_subsets(limit, below, num_stages)

    for number, search in enumerate(searches):
        if search.most > least(number):
            offer(number, search.improvements(least(number), along(search), search.alone))
    left = [number for number, search in enumerate(searches) if search.exact_stages is not None]
    for level in _levels(searches):
        for number in tuple(left):
            search, low = searches[number], max(level, least(number))
            if low > level:
                left.remove(number)
            if min(search.most, search.proven_most) > low:
                search.keep_hopeful(low)
                offer(number, search.improvements(low, over(search)))
                if search.is_exact:
                    search.proven_most = max(low, best[number][0] if number in best else 0.0)
    order = sorted(best, key=lambda number: -best[number][0])
    return [
        (searches[number], best[number][1])
        for number in order
        if best[number][0] >= best[order[0]][0] * (1 - within)
    ]


def _levels(searches: Sequence[Search]) -> Iterator[float]:
    """Scores to look for, from what may be down to none, so that few stages find a good route."""
    level = max((search.most for search in searches if search.is_exact), default=math.inf)
    yield from (level * _LEVEL**n for n in range(1, 1 + _NUM_LEVELS if level < math.inf else 0))
    yield 0.0
