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
from collections.abc import Iterable, Sequence
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
        return _most(self.steps[at].high, streams, limit_T, trip_ST)


class Outlook:
    """What a pipeline on all of a few places may yield, in steps of so many sequences."""

    def __init__(self, placing: Placing, tokens: int) -> None:
        self._is_busy = placing.workload.objective == "throughput"
        self._streams = placing.workload.max_concurrency if self._is_busy else 1
        self._tokens, self._gains = tokens, _Gains(placing, tokens)
        self._trip_s = float(self._gains.trips_of_all(NO_LIMIT)[0])

    @cached_property
    def most(self) -> float:
        """Tokens per second, of all streams or of one alone; 0: it does not fit."""
        if not self._is_busy or self._trip_s == math.inf:
            return 1 / self._trip_s
        limits = self._gains.limits(self._trip_s, slowest=1.0)
        trip_ST = np.append(self._trip_s, self._gains.trips_of_all(limits))[None, :]
        most_S = _most(self._tokens, self._streams, np.append(NO_LIMIT, limits), trip_ST)
        return float(most_S[0])

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


def _most(tokens: int, streams: int, limit_T: Array, trip_ST: Array) -> Array:
    """[set]: tokens per second, by the round trips within limits that descend from none at all.
    Between two of them a bottleneck is no shorter than the lower one, and a round trip no shorter
    than within the upper one."""
    most_T = np.append(tokens / limit_T[1:], math.inf)
    found: Array = np.minimum(streams / trip_ST, most_T).max(axis=1)
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
        found: Array = np.maximum(
            self._round(self._most(limit_T, range(1, 1 << self._count))), 1e-300
        )
        return found

    def trips_of_all(self, limit_T: Array) -> Array:
        """[T]: the same of all devices. Its sets are without the first device, but for the last."""
        last = (1 << self._count) - 1
        most_STP = self._most(limit_T, (*range(2, last, 2), last))
        found: Array = np.maximum(self._round(most_STP[-1]), 1e-300)
        return found

    def trip_s(self, stages: Sequence[tuple[int, int]], limit_s: float) -> float:
        """Seconds at least of a round trip through these stages, none of which takes longer than
        the limit; inf: they do not hold the model."""
        gain_P = np.sum([self._own(limit_s, *stage) for stage in stages], axis=0)
        return float(self._round(gain_P))

    def stages_within(self, limit_s: float, trip_s: float) -> set[tuple[int, int]]:
        """Those with which a round trip may still be that short, the others being the best."""
        others_MP = self._most(np.array([limit_s]), range(1, 1 << self._count))[::-1, 0]
        found = set()
        for home in range(self._count):
            own_MP = self._own(limit_s, home, slice(None))
            is_hopeful_M = (self._round(own_MP + others_MP) <= trip_s) & (own_MP[:, -1] > 0)
            found |= {(home, int(members)) for members in is_hopeful_M.nonzero()[0]}
        return found

    def _own(self, limit_s: float, home: int, members: int | slice) -> Array:
        """[..., P]: what stages of a home gain at most that take no longer than a limit."""
        fits_K = self._floor_NMK[home, members] <= limit_s
        found: Array = self._gains(np.where(fits_K, self._cost_NMK[home, members], math.inf))
        return found[..., -1, :]

    def _round(self, gain_P: Array) -> Array:
        """[...]: seconds of a round trip at least by what its stages gain."""
        trip = (self._price_P * self._num_layers - gain_P[..., :-1]).max(axis=-1)
        found: Array = np.where(gain_P[..., -1] < self._num_layers, math.inf, trip)
        return found

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
