"""Divide devices and streams among pipelines, each of which holds the whole model.

A division gives every device to one pipeline, which may leave it unused, and every pipeline some of
the streams. For few devices the best one is found among all partitions: what a share yields is
first an upper bound, and becomes exact only where the division with the greatest sum needs it.
What a share yields is computed once, whatever divisions it is part of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .problem import Matrix

EXACT_DIVIDED = 5
"""Devices up to which all partitions are searched."""
MOST_PORTIONS = 16
"""About as many portions as streams are cut into; up to twice that, every stream is one."""
_GROWTH = 7
"""Times the effort of planning a share that one device more in it takes."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Share:
    """What a pipeline has: devices as a bit mask, and streams."""

    sites: int
    streams: int


class Offers(Protocol):
    """What pipelines make of shares, in a measure that adds up."""

    def most(self, share: Share) -> float:
        """No pipeline makes more of it; 0: it does not fit. Quick."""
        ...

    def best(self, share: Share, floor: float) -> float:
        """What the best pipeline makes of it; less than `floor` may be anything below that."""
        ...


@dataclass(frozen=True, slots=True)
class Division:
    """Shares that are disjoint, and what they yield together."""

    shares: tuple[Share, ...]
    score: float
    is_best: bool
    """Whether no division into these portions yields more."""


def best_division(
    offers: Offers,
    num_sites: int,
    streams: int,
    *,
    start: tuple[Share, ...] = (),
    score: float = 0.0,
    num_pipelines: int | None = None,
    evenly: bool = False,
    effort: float = math.inf,
) -> Division | None:
    """The best of all divisions, with so many pipelines if that is given; None: nothing fits.

    `start` is a division to begin with, which yields `score`. With `evenly`, pipelines get the same
    number of streams, but for those that have one more. To look closely at a share of n devices
    takes an effort of ``7**n``; once more than `effort` is spent the best division so far is the
    answer.
    """
    tables = _Tables(offers, num_sites, streams)
    divisions = [
        _Candidate(groups, tables, evenly=evenly)
        for groups in partitions(tuple(range(num_sites)))
        if num_pipelines in (None, len(groups)) and len(groups) <= streams
    ]
    best = start
    while divisions:
        candidate = max(divisions, key=lambda each: each.total)
        if candidate.total <= score * (1 + _ROUNDING):
            break
        shares = candidate.shares()
        assert shares is not None
        open_shares = [share for share in shares if not tables.is_settled(share)]
        if not open_shares:
            best, score = shares, candidate.total
            continue
        share = min(open_shares, key=lambda each: (each.sites.bit_count(), each.sites))
        effort -= _GROWTH ** share.sites.bit_count()
        if effort < 0 and best:
            return Division(best, score, is_best=False)
        tables.settle(share, score - candidate.total + tables.yields(share))
    return Division(best, score, is_best=True) if best else None


class _Tables:
    """What shares yield: bounds at first."""

    def __init__(self, offers: Offers, num_sites: int, streams: int) -> None:
        self._offers = offers
        self.unit = portion(streams)
        self.units, self._rest = divmod(streams, self.unit)
        self._rows: dict[int, Matrix] = {}
        self._settled: set[Share] = set()
        self.version: dict[int, int] = {}
        """Grows with every change of what a set of devices yields."""

    def share(self, sites: int, units: int) -> Share:
        """What does not make a whole portion goes to whoever has the first device."""
        return Share(sites, units * self.unit + (sites & 1) * self._rest)

    def row(self, sites: int) -> Matrix:
        """[units]: what devices yield with so many portions."""
        if sites not in self._rows:
            row = np.full(self.units + 1, -math.inf)
            for units in range(1, self.units + 1):
                most = self._offers.most(self.share(sites, units))
                row[units] = most if most > 0 else -math.inf
            self._rows[sites] = row
        return self._rows[sites]

    def yields(self, share: Share) -> float:
        """As far as it is known."""
        return float(self.row(share.sites)[share.streams // self.unit])

    def is_settled(self, share: Share) -> bool:
        """Whether that is exact, or no more is of interest."""
        return share in self._settled

    def settle(self, share: Share, floor: float) -> None:
        """Look closely; what is not above `floor` stays a bound."""
        floor = max(floor, 0.0)
        found = self._offers.best(share, floor)
        if found > floor or floor <= 0:
            self._settled.add(share)
        row = self.row(share.sites)
        known = max(found, floor)
        row[share.streams // self.unit] = known if known > 0 else -math.inf
        self.version[share.sites] = self.version.get(share.sites, 0) + 1


class _Candidate:
    """A partition of the devices, with the best way to share the streams out."""

    def __init__(self, groups: tuple[int, ...], tables: _Tables, *, evenly: bool) -> None:
        self.groups = groups
        self._tables = tables
        self._evenly = evenly
        self._seen: list[int] | None = None
        self._found: tuple[float, tuple[int, ...]] = (-math.inf, ())

    @property
    def total(self) -> float:
        """What it yields as far as that is known; -inf: it does not fit."""
        return self._best()[0]

    def shares(self) -> tuple[Share, ...] | None:
        """With the streams shared out so."""
        total, units = self._best()
        if total == -math.inf:
            return None
        pairs = zip(self.groups, units, strict=True)
        return tuple(self._tables.share(sites, count) for sites, count in pairs)

    def _best(self) -> tuple[float, tuple[int, ...]]:
        seen = [self._tables.version.get(group, 0) for group in self.groups]
        if seen != self._seen:
            rows = [self._tables.row(group) for group in self.groups]
            if self._evenly:
                least, more = divmod(self._tables.units, len(rows))
                allowed = np.full(self._tables.units + 1, -math.inf)
                allowed[least : least + 1 + (more > 0)] = 0.0
                rows = [row + allowed for row in rows]
            self._seen, self._found = seen, shared_out(rows)
        return self._found


def portion(streams: int) -> int:
    """How many streams are given away together."""
    return max(1, streams // MOST_PORTIONS)


def shared_out(rows: Sequence[Matrix]) -> tuple[float, tuple[int, ...]]:
    """The greatest sum of one entry of each row whose numbers add up to the last one, and these."""
    best = rows[0]
    chosen: list[npt.NDArray[np.int64]] = []
    for row in rows[1:]:
        grown = np.full(len(row), -math.inf)
        taken = np.zeros(len(row), dtype=np.int64)
        for count, value in enumerate(row):
            if value == -math.inf:
                continue
            sums = best[: len(row) - count] + value
            better = sums > grown[count:]
            grown[count:][better] = sums[better]
            taken[count:][better] = count
        chosen.append(taken)
        best = grown
    left, counts = len(rows[0]) - 1, []
    for taken in reversed(chosen):
        counts.append(int(taken[left]))
        left -= counts[-1]
    return float(best[-1]), (left, *reversed(counts))


def partitions(items: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every way to part the items into groups, each as a bit mask; few groups first in each."""
    if not items:
        yield ()
        return
    first, rest = items[0], items[1:]
    for others in partitions(rest):
        for at in range(len(others)):
            yield (*others[:at], others[at] | 1 << first, *others[at + 1 :])
        yield (1 << first, *others)
