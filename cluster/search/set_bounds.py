"""What a pipeline on each set of a few devices yields at most: stages by price.

A pipeline consists of stages with disjoint members. Let a stage of k layers with the members m take
g(m, k) seconds at least, the way to it included. For any price p of a layer

    round trip  >=  sum of g  =  p * layers - sum of (p * k - g)  >=  p * layers - P(set)

where P(set) is the most that disjoint members from a set can gain, each with the number of layers
that suits it best: one programme over subsets. The best price of some gives the bound. A
bottleneck of t seconds leaves out stages that take longer, and with them the round trip grows: a
pipeline of n sequences in steps of b has at most ``min(b / t, n / round trip within t)`` tokens per
second. With a grid of t, that is a bound for all t between two of them, too.

    B  sequences per step      T  bottlenecks, the first without limit      P  prices, and coverage
    K  numbers of layers, from 0 on      sets are bit masks over devices
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from .expert_cost import Array
from .placing import Placing
from .stage_floor import stage_floors

MOST_DEVICES = 8
"""Up to which all subsets are weighed."""
_NUM_PRICES = 14
_DEAREST = 40.0
"""Times the least seconds of a layer, up to which prices go."""
_WORK = 1_500_000
"""Of the programme: the grid of bottlenecks is as fine as that allows, within these:"""
_FEWEST_LIMITS, _MOST_LIMITS = 16, 48
_SLOWEST = 8.0
"""Times the round trip of all devices, up to which bottlenecks are told apart."""
_NEARLY = 0.9
"""Share of the layers that stages have to gain with, to be thought of together."""
_SAFE = 1 - 1e-9
"""Off every bound on seconds, for sums of another order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """A range of sequences per step, which is bounded as one: times are those of the least of them,
    tokens those of the most."""

    placing: Placing
    """With no more keys and values than any pipeline with such steps holds."""
    low: int
    high: int


class SetBounds:
    """Bounds for all sets of the same few places, by ranges of sequences per step."""

    def __init__(self, steps: Sequence[Steps]) -> None:
        self.steps = steps
        self._is_busy = steps[0].placing.workload.objective == "throughput"
        self._limit_BT: list[Array] = []
        self._trip_BST: list[Array] = []
        for each in steps:
            gains = _Gains(each.placing, each.low)
            limit_T, trip_ST = NO_LIMIT, gains.trips(NO_LIMIT)
            whole_s = float(trip_ST[-1, 0])
            if self._is_busy and whole_s < math.inf:
                limits = gains.limits(whole_s, slowest=_SLOWEST)
                limit_T = np.append(limit_T, limits)
                trip_ST = np.concatenate([trip_ST, gains.trips(limits)], axis=1)
            self._limit_BT.append(limit_T)
            self._trip_BST.append(trip_ST)

    def most_S(self, streams: int, at: int) -> Array:
        """[set]: tokens per second of so many streams with steps of the range `at`, or of one
        stream alone where the objective is latency; 0: it does not fit."""
        limit_T, trip_ST = self._limit_BT[at], self._trip_BST[at]
        if not self._is_busy:
            alone: Array = 1 / trip_ST[:, 0]
            return alone
        found: Array = _rates(self.steps[at].high, streams, limit_T, trip_ST).max(axis=1)
        return found


class Outlook:
    """What a pipeline on all of a few places may yield, in steps of so many sequences."""

    def __init__(self, placing: Placing, tokens: int) -> None:
        self._is_busy = placing.workload.objective == "throughput"
        self._streams = placing.workload.max_concurrency if self._is_busy else 1
        self._tokens, self._gains = tokens, _Gains(placing, tokens)
        self._trip_s = float(self._gains.round(self._gains.most_of_all(NO_LIMIT)[-1, 0]))

    @cached_property
    def most(self) -> float:
        """Tokens per second, of all streams or of one alone; 0: it does not fit."""
        return float(self._rate_T.max())

    @cached_property
    def _limit_T(self) -> Array:
        """Bottlenecks that are told apart."""
        if not self._is_busy or self._trip_s == math.inf:
            return NO_LIMIT
        return np.append(NO_LIMIT, self._gains.limits(self._trip_s, slowest=1.0))

    @cached_property
    def _most_STP(self) -> Array:
        return self._gains.most_of_all(self._limit_T)

    @cached_property
    def _rate_T(self) -> Array:
        """Tokens per second at most with a bottleneck between one and the next."""
        trip_T = self._gains.round(self._most_STP[-1])
        if not self._is_busy:
            found: Array = 1 / trip_T
            return found
        return _rates(self._tokens, self._streams, self._limit_T, trip_T)

    def ideals(self) -> list[tuple[tuple[int, int], ...]]:
        """As `problem.Outlook.ideals`: for the bottleneck at which the bound lies and those beside
        it, and for every price."""
        top = int(self._rate_T.argmax())
        found: dict[tuple[tuple[int, int], ...], None] = {}
        for at in range(max(0, top - 1), min(len(self._limit_T), top + 2)) if self.most else ():
            most_SP, limit_s = self._most_STP[:, at], float(self._limit_T[at])
            found |= dict.fromkeys(self._gains.best_parts(most_SP, limit_s))
        return list(found)

    def hopeful(self, least: float) -> set[tuple[int, int]]:
        """Home and members of all stages of pipelines with at least so many tokens per second."""
        return self._gains.stages_within(*self._times(least))

    def may_yield(self, least: float, stages: Sequence[tuple[int, int]]) -> bool:
        """Whether a pipeline of just these stages may have so many tokens per second."""
        limit_s, trip_s = self._times(least)
        return self._gains.trip_s(stages, limit_s) <= trip_s

    def _times(self, least: float) -> tuple[float, float]:
        """Of a bottleneck and a round trip with so many tokens per second."""
        limit_s = self._tokens / least if self._is_busy and least else math.inf
        return limit_s, self._streams / least if least else math.inf


NO_LIMIT = np.array([math.inf])


def _rates(tokens: int, streams: int, limit_T: Array, trip_T: Array) -> Array:
    """[..., T]: tokens per second, by the round trips within limits that descend from none at all.
    Between two of them a bottleneck is no shorter than the lower one, and a round trip no shorter
    than within the upper one."""
    most_T = np.append(tokens / limit_T[1:], math.inf)
    found: Array = np.minimum(streams / trip_T, most_T)
    return found


class _Gains:
    """What stages gain at each price of a layer, the last "price" being for layers alone."""

    def __init__(self, placing: Placing, tokens: int) -> None:
        problem = placing.problem(tokens)
        self._num_layers, self._count = problem.num_layers, len(problem.sites)
        hop_s = problem.hop_s.copy()
        hop_s[np.diag_indices(self._count)] = math.inf
        arriving_s = np.minimum(hop_s.min(axis=0), problem.return_s.min(axis=0))
        self._floor_NMK = stage_floors(placing, tokens) * _SAFE
        self._cost_NMK = self._floor_NMK + arriving_s[:, None, None] * _SAFE
        self._layers = np.arange(self._num_layers + 1)
        self._floor_MK = self._floor_NMK.min(axis=0)
        least_s = float((self._floor_MK[:, 1:] / self._layers[1:]).min())
        is_any = least_s < math.inf
        self._price_P = (least_s if is_any else 1.0) * np.geomspace(1.0, _DEAREST, _NUM_PRICES)
        self._gain_MKP = self._gains(self._cost_NMK.min(axis=0))

    def _gains(self, cost_K: Array) -> Array:
        """[..., K, P]: with no more than so many layers."""
        gain_KP = np.maximum(self._price_P * self._layers[:, None] - cost_K[..., None], 0.0)
        covered_K = np.where(np.isfinite(cost_K), self._layers, 0.0)
        gain_KP = np.concatenate([gain_KP, covered_K[..., None]], axis=-1)
        found: Array = np.maximum.accumulate(gain_KP, axis=-2)
        return found

    def limits(self, whole_s: float, *, slowest: float) -> Array:
        """Bottlenecks from a multiple of a round trip of all devices down to half the mean of as
        many stages as there are devices; shorter ones, behind long ways, are not told apart."""
        num_limits = _WORK // (3**self._count * (_NUM_PRICES + 1))
        num_limits = min(_MOST_LIMITS, max(_FEWEST_LIMITS, num_limits))
        found: Array = np.geomspace(slowest * whole_s, whole_s / self._count / 2, num_limits)
        return found

    def trips(self, limit_T: Array) -> Array:
        """[set, T]: seconds of a round trip at least; inf: it does not fit."""
        return self.round(self._most(limit_T, range(1, 1 << self._count)))

    def most_of_all(self, limit_T: Array) -> Array:
        """[set, T, P]: as `_most`, of all devices and of the sets that these are parted into: those
        without the first one."""
        last = (1 << self._count) - 1
        return self._most(limit_T, (*range(2, last, 2), last))

    def trip_s(self, stages: Sequence[tuple[int, int]], limit_s: float) -> float:
        """Seconds at least of a round trip through these stages, none of which takes longer than
        the limit; inf: they do not hold the model."""
        gain_P = np.sum([self._own(limit_s, *stage) for stage in stages], axis=0)
        return float(self.round(gain_P))

    def stages_within(self, limit_s: float, trip_s: float) -> set[tuple[int, int]]:
        """Those with which a round trip may still be that short, the others being the best."""
        others_MP = self._most(np.array([limit_s]), range(1, 1 << self._count))[::-1, 0]
        found = set()
        for home in range(self._count):
            own_MP = self._own(limit_s, home, slice(None))
            is_hopeful_M = (self.round(own_MP + others_MP) <= trip_s) & (own_MP[:, -1] > 0)
            found |= {(home, int(members)) for members in is_hopeful_M.nonzero()[0]}
        return found

    def _own(self, limit_s: float, home: int, members: int | slice) -> Array:
        """[..., P]: what stages of a home gain at most that take no longer than a limit."""
        fits_K = self._floor_NMK[home, members] <= limit_s
        found: Array = self._gains(np.where(fits_K, self._cost_NMK[home, members], math.inf))
        return found[..., -1, :]

    def round(self, gain_P: Array) -> Array:
        """[...]: seconds of a round trip at least by what its stages gain."""
        trip = (self._price_P * self._num_layers - gain_P[..., :-1]).max(axis=-1)
        found: Array = np.where(gain_P[..., -1] < self._num_layers, math.inf, trip)
        return np.maximum(found, 1e-300)

    def best_parts(self, most_SP: Array, limit_s: float) -> Iterator[tuple[tuple[int, int], ...]]:
        """Homes and members of the disjoint stages by which `most_of_all` came to ``most_SP``
        within a limit, for each price at which they have nearly all layers or more."""
        cost_NMK = np.where(self._floor_NMK <= limit_s, self._cost_NMK, math.inf)
        cost_MK = cost_NMK.min(axis=0)
        for price_s, most_S in zip(self._price_P, most_SP.T, strict=False):
            gain_M = (price_s * self._layers - cost_MK).max(axis=1)
            stages, layers, left = [], 0, len(most_S) - 1
            while left:
                low = left & -left
                rest = left ^ low
                subsets = subsets_of(rest)
                together = gain_M[low | subsets] + most_S[rest ^ subsets]
                at = int(together.argmax())
                left = rest
                if together[at] > most_S[rest]:
                    members = int(low | subsets[at])
                    gain_NK = price_s * self._layers - cost_NMK[:, members]
                    home, count = divmod(int(gain_NK.argmax()), len(self._layers))
                    stages.append((home, members))
                    layers += count
                    left = rest ^ int(subsets[at])
            if layers >= _NEARLY * self._num_layers:
                yield tuple(sorted(stages))

    def _most(self, limit_T: Array, sets: Iterable[int]) -> Array:
        """[set, T, P]: what disjoint stages gain at most that take no longer than the limits; of
        these sets, which are ascending, each after all that it is made of."""
        fits_MTK = self._floor_MK[:, None, :] <= limit_T[:, None]
        longest_MT = np.where(fits_MTK, self._layers, 0).max(axis=2)
        gain_MTP = self._gain_MKP[np.arange(len(fits_MTK))[:, None], longest_MT]
        most_STP: Array = np.zeros_like(gain_MTP)
        for members in sets:
            low = members & -members
            rest = members ^ low
            subsets = subsets_of(rest)
            together = (gain_MTP[low | subsets] + most_STP[rest ^ subsets]).max(axis=0)
            most_STP[members] = np.maximum(most_STP[rest], together)
        return most_STP


@cache
def subsets_of(members: int) -> Array:
    """Of a bit mask, itself and nothing included."""
    found = np.zeros(1, dtype=np.int64)
    for at in range(members.bit_length()):
        if members >> at & 1:
            found = np.concatenate([found, found | 1 << at])
    return found
