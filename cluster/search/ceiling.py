"""What pipelines can yield at most: bounds that cost next to nothing, for shares and for all.

A device works for one pipeline all the time at best, and a token needs all layers of somebody. A
stream has one token on its way, which takes as long as the fastest devices need for all layers.
Numbers of sequences per step are told apart in ranges: times are those of the least of a range,
tokens those of the most.

    N  sites      B  ranges of sequences per step      P  prices of a layer's own work
"""

from __future__ import annotations

import math
from functools import cache, cached_property

import numpy as np

from .division import EXACT_DIVIDED, Share, partitions, portion, shared_out
from .placing import Placing
from .problem import Matrix

_MOST_RANGES = 12
_PRICES = np.linspace(0.0, 1.0, 17)
"""Shares of a layer's worth that its own work has; its experts have the rest. Any gives a bound."""


class Ceiling:
    """Bounds on what the places of a `Placing` yield for up to its streams."""

    def __init__(self, placing: Placing) -> None:
        self._placing = placing
        self._busy = placing.workload.objective == "throughput"
        streams = placing.workload.max_concurrency if self._busy else 1
        self._highs = _ranges(streams)
        self._low_B = np.array([1, *(high + 1 for high in self._highs[:-1])])
        self._trip_B = cache(self._least_trip_B)
        weights = list(placing.weights.values())
        self._shares = placing.problem(1).shared is not None
        context = 0 if self._shares else placing.workload.max_context_tokens
        held = min(each.workspace_bytes(context) for each in weights)
        self._room_N = np.array([max(0, place.usable_bytes - held) for place in placing.places])
        self._layer_bytes = min(min(each.layer_bytes) for each in weights)
        self._num_layers = len(weights[0].layer_bytes)
        self._model_bytes = min(each.weights_bytes for each in weights)

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

    def most(self, share: Share, *, least_streams: int | None = None) -> float:
        """Tokens per second of a pipeline, of its streams or of one alone; 0: it does not fit, with
        `least_streams` if these are fewer."""
        sites, streams = share.sites, share.streams
        if not self.fits(sites, least_streams or streams):
            return 0.0
        chosen = list(numbers(sites))
        trip_B = self._trip_B(sites)
        if not self._busy:
            return float(1 / trip_B[0])
        rate_B = self._rate_BPN[:, :, chosen].sum(axis=2).min(axis=1)
        found_B = np.minimum(rate_B, streams / trip_B)
        return float(found_B[self._low_B <= streams].max())

    def _least_trip_B(self, sites: int) -> Matrix:
        """Seconds of all layers, each on the device that has it done soonest, and the way back."""
        placing = self._placing
        homes = numbers(sites)
        trips = [
            np.min([placing.least_layer_L(home, sites, int(low)) for home in homes], axis=0).sum()
            for low in self._low_B
        ]
        found: Matrix = np.array(trips) + self._return_B
        return found

    def most_in_all(self) -> float:
        """Tokens per second of two pipelines or more, however places and streams are divided."""
        if len(self._placing.places) > EXACT_DIVIDED:
            return self._most_by_price()
        return min(self._most_by_price(), self._most_of_partitions())

    def _most_of_partitions(self) -> float:
        """Every partition, with streams in portions that may all be nearly one larger."""
        streams = self._placing.workload.max_concurrency
        unit = portion(streams)

        @cache
        def row(sites: int) -> Matrix:
            counts = range(streams // unit + 1)
            most = [
                self.most(
                    Share(sites, min(streams, max(1, (units + 1) * unit - 1))),
                    least_streams=max(1, units * unit),
                )
                for units in counts
            ]
            if unit == 1:
                most[0] = 0.0
            return np.where(np.array(most) > 0, most, -math.inf)

        found = 0.0
        for groups in partitions(tuple(range(len(self._placing.places)))):
            if 2 <= len(groups) <= streams:
                found = max(found, shared_out([row(group) for group in groups])[0])
        return float(found)

    def _most_by_price(self) -> float:
        """By a price of streams: what a pipeline is paid for its tokens, less what their streams
        cost, is no more than what each of its devices earns at the best size of its steps.
        """
        streams = self._placing.workload.max_concurrency
        trip_B = self._trip_B((1 << len(self._placing.places)) - 1)
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


def _ranges(streams: int) -> list[int]:
    """The ends of the ranges of 1 to `streams` sequences."""
    if streams <= _MOST_RANGES:
        return list(range(1, streams + 1))
    return sorted({int(each) for each in np.ceil(np.geomspace(1, streams, _MOST_RANGES))})
