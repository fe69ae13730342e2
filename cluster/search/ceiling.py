"""What pipelines can yield at most: bounds that cost next to nothing, for shares and for all.

Few devices are bounded set by set (`set_bounds.py`), and together by the best partition. Of many a
device works for one pipeline all the time at best, and a token needs all layers of somebody; a
stream has one token on its way, which takes as long as the fastest devices need for all layers.
Numbers of sequences per step are told apart in ranges: times are those of the least of a range,
tokens those of the most.

    N  sites      B  ranges of sequences per step      P  prices of a layer's own work
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache, cached_property

import numpy as np

from .division import Share, portion
from .placing import Placing
from .problem import Matrix
from .set_bounds import MOST_DEVICES, SetBounds, Steps, subsets_of

_FEW_RANGES, _MOST_RANGES = 8, 12
_PRICES = np.linspace(0.0, 1.0, 17)
"""Shares of a layer's worth that its own work has; its experts have the rest. Any gives a bound."""


class Ceiling:
    """Bounds on what the places of a `Placing` yield for up to its streams."""

    def __init__(self, placing: Placing) -> None:
        self._placing = placing
        self._busy = placing.workload.objective == "throughput"
        self._is_small = len(placing.places) <= MOST_DEVICES
        streams = placing.workload.max_concurrency if self._busy else 1
        self._highs = _ranges(streams, _FEW_RANGES if self._is_small else _MOST_RANGES)
        self._low_B = np.array([1, *(high + 1 for high in self._highs[:-1])])
        weights = list(placing.weights.values())
        self._shares = placing.problem(1).shared is not None
        context = 0 if self._shares else placing.workload.max_context_tokens
        held = min(each.workspace_bytes(context) for each in weights)
        self._room_N = np.array([max(0, place.usable_bytes - held) for place in placing.places])
        self._layer_bytes = min(min(each.layer_bytes) for each in weights)
        self._num_layers = len(weights[0].layer_bytes)
        self._model_bytes = min(each.weights_bytes for each in weights)
        self._most_S = cache(self._most_of_sets)

    def most_pipelines(self) -> int:
        """No more hold the model, with the keys and values of all streams."""
        kv_bytes = self._placing.kv_bytes * self._num_layers
        return max(0, int((self._room_N.sum() - kv_bytes) // self._model_bytes))

    def fits(self, sites: int, streams: int) -> bool:
        """False: a pipeline with so many streams does certainly not fit there."""
        room = self._room_N[list(numbers(sites))]
        kv_bytes = self._placing.kv_bytes_for(streams)
        if room.sum() < self._model_bytes + kv_bytes * self._num_layers:
            return False
        if self._shares:
            return True
        return bool((room // (self._layer_bytes + kv_bytes)).sum() >= self._num_layers)

    def most(self, share: Share) -> float:
        """Tokens per second of a pipeline, of its streams or of one alone; 0: it does not fit. For
        few devices only."""
        if not self.fits(share.sites, share.streams):
            return 0.0
        ranges = self._ranges_of(share.sites.bit_count(), share.streams)
        return max(float(self._most_S(share.streams, at)[share.sites]) for at in ranges)

    def _ranges_of(self, num_sites: int, streams: int) -> set[int]:
        """Of the steps that a pipeline may make, with no more micro-batches than pay."""
        if not self._busy:
            return {0}
        counts = range(1, min(num_sites + 1, streams) + 1)
        return {bisect_left(self._highs, -(-streams // count)) for count in counts}

    @cached_property
    def _sets(self) -> SetBounds:
        every = range(len(self._placing.places))
        ends = [(int(low), high) for low, high in zip(self._low_B, self._highs, strict=True)]
        return SetBounds(
            [
                Steps(placing=self._placing.part(every, low), low=low, high=high)
                for low, high in ends
            ]
        )

    def _most_of_sets(self, streams: int, at: int) -> Matrix:
        return self._sets.most_S(streams, at)

    def most_in_all(self) -> float:
        """Tokens per second of two pipelines or more, however places and streams are divided."""
        return self._most_of_partitions() if self._is_small else self._most_by_price()

    def _most_of_partitions(self) -> float:
        """Every partition, with streams in portions that may all be nearly one larger."""
        row_SU = self._rows_SU()
        num_sets, units = len(row_SU), row_SU.shape[1] - 1
        # [U, U]: what is left of so many portions for the others; the last column is none.
        left_UU = np.arange(units + 1)[None, :] - np.arange(units + 1)[:, None]
        left_UU[left_UU < 0] = units + 1
        # Of all that a set yields, in one pipeline or more, with so many portions.
        best_SU = np.full((num_sets, units + 2), -math.inf)
        best_SU[0, 0] = 0.0
        for sites in range(1, num_sets):
            low = sites & -sites
            first = low | subsets_of(sites ^ low)
            if sites == num_sets - 1:
                first = first[:-1]  # two pipelines at least
            together = row_SU[first, :, None] + best_SU[sites ^ first][:, left_UU]
            best_SU[sites, :-1] = together.max(axis=(0, 1), initial=-math.inf)
        return max(0.0, float(best_SU[-1, units]))

    def _rows_SU(self) -> Matrix:
        """[set, U]: what a pipeline yields at most with U portions, or nearly one more; -inf: it
        does not fit."""
        count, streams = len(self._placing.places), self._placing.workload.max_concurrency
        unit = portion(streams)
        sizes_S = np.array([sites.bit_count() for sites in range(1 << count)])
        row_SU = np.zeros((1 << count, streams // unit + 1))
        for number in range(unit == 1, row_SU.shape[1]):
            least, most = max(1, number * unit), min(streams, max(1, (number + 1) * unit - 1))
            for size in range(1, count + 1):
                of_size = np.flatnonzero(sizes_S == size)
                ranges = {
                    at
                    for streams_of_it in range(least, most + 1)
                    for at in self._ranges_of(size, streams_of_it)
                }
                for at in ranges:
                    yields_S = self._most_S(most, at)[of_size]
                    row_SU[of_size, number] = np.maximum(row_SU[of_size, number], yields_S)
        return np.where(row_SU > 0, row_SU, -math.inf)

    @cached_property
    def _rate_BPN(self) -> Matrix:
        """Tokens per second that each site earns of a pipeline's, at each price."""
        rates = []
        for low, high in zip(self._low_B, self._highs, strict=True):
            problem = self._placing.problem(int(low))
            least, num_layers = problem.least, problem.num_layers
            own_N = num_layers * least.own_NL.min(axis=1)
            if not least.num_experts:  # all of a layer is its own work
                rates.append(np.broadcast_to(high / own_N, (len(_PRICES), len(own_N))))
                continue
            experts_N = num_layers * least.num_experts * least.expert_NL.min(axis=1)
            own = _PRICES[:, None] / own_N
            rates.append(high * np.maximum(own, (1 - _PRICES[:, None]) / experts_N))
        return np.array(rates)

    @cached_property
    def _return_B(self) -> Matrix:
        return np.array([self._placing.problem(int(low)).return_s.min() for low in self._low_B])

    @cached_property
    def _trip_B(self) -> Matrix:
        """Seconds of all layers, each on the device that has it done soonest, and the way back."""
        placing, count = self._placing, len(self._placing.places)
        every = (1 << count) - 1
        trips = [
            np.min(
                [placing.least_layer_L(home, every, int(low)) for home in range(count)], axis=0
            ).sum()
            for low in self._low_B
        ]
        found: Matrix = np.array(trips) + self._return_B
        return found

    def _most_by_price(self) -> float:
        """By a price of streams: what a pipeline is paid for its tokens, less what their streams
        cost, is no more than what each of its devices earns at the best size of its steps.
        """
        streams = self._placing.workload.max_concurrency
        trip_B = self._trip_B
        usable = self._low_B < streams if streams > 1 else self._low_B <= streams
        found = math.inf
        for price in np.linspace(0.0, 1 / trip_B[0], 65):
            earned_B = np.maximum(0.0, 1 - price * trip_B) * usable
            earned_PN = (self._rate_BPN * earned_B[:, None, None]).max(axis=0)
            found = min(found, streams * price + float(earned_PN.sum(axis=1).min()))
        return float(found)


def numbers(sites: int) -> tuple[int, ...]:
    """The numbers of a bit mask, ascending."""
    return tuple(at for at in range(sites.bit_length()) if sites >> at & 1)


def _ranges(streams: int, most: int) -> list[int]:
    """The ends of the ranges of 1 to `streams` sequences."""
    if streams <= most:
        return list(range(1, streams + 1))
    return sorted({int(each) for each in np.ceil(np.geomspace(1, streams, most))})
