"""Guess what a share of devices and streams yields, in about a millisecond and without a search.

The devices of a share form one chain, the fastest of them first; layers fill them up to a common
time, as far as memory allows. Good enough to rank divisions of many devices; what is chosen is then
planned properly.

    B  numbers of sequences per step      N  sites
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from .ceiling import Ceiling, numbers
from .division import Share
from .expert_cost import hosts_s
from .expert_split import in_turn
from .mix import mean
from .placing import Placing
from .problem import Matrix

_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
"""Of chains that are tried."""
_HALVINGS = 16
_GRID = 9
_MOST_SHARING = 8
"""Devices that may share the experts of all layers."""


class Sketch:
    """Guesses for the places of a `Placing` and up to its streams."""

    def __init__(self, placing: Placing, ceiling: Ceiling) -> None:
        self._placing, self._ceiling = placing, ceiling
        self.is_busy = placing.workload.objective == "throughput"
        streams = placing.workload.max_concurrency
        tokens = sorted({int(each) for each in np.ceil(np.geomspace(1, streams, _GRID))})
        problems = [placing.problem(each) for each in tokens]
        self._tokens_B = np.array(tokens)
        first = problems[0]
        self._num_layers = first.num_layers
        self.layer_s_BN = np.array(
            [[site.seconds_L[-1] / self._num_layers for site in each.sites] for each in problems]
        )
        self._ends_BN = np.array(
            [[site.first_s + site.last_s for site in each.sites] for each in problems]
        )
        self.hop_s = first.hop_s
        self._return_s = first.return_s
        self._transfer_s = first.transfer_s
        self._capacity_N = np.array([site.capacity for site in first.sites])
        self._ends_bytes = first.sites[0].first_bytes + first.sites[0].last_bytes
        self._layer_bytes_N = np.array(
            [max(placing.weights[dtype].layer_bytes) for dtype in placing.dtypes],
            dtype=float,
        )
        self.yields = cache(self._yields)
        self._layer_s = cache(self._layers_s)

    def room_N(self, streams: int) -> Matrix:
        """Layers that fit on each site, with the keys and values of so many streams."""
        need_N = self._layer_bytes_N + self._placing.kv_bytes_for(streams)
        found: Matrix = np.maximum(0.0, np.floor(self._capacity_N / need_N))
        return found

    def speed_N(self) -> Matrix:
        """Layers per second of each site in large steps."""
        found: Matrix = 1 / self.layer_s_BN[-1]
        return found

    def _yields(self, share: Share) -> float:
        """Tokens per second of its streams, or of one alone; 0: it does not fit."""
        return max(self._of_chains(share), self._of_one_stage(share))

    def _of_one_stage(self, share: Share) -> float:
        """The fastest device at home, its experts on all."""
        sites, placing = numbers(share.sites), self._placing
        if not 1 < len(sites) <= _MOST_SHARING or placing.problem(1).shared is None:
            return 0.0
        if not self._ceiling.fits(share.sites, share.streams):
            return 0.0
        home = min(sites, key=lambda site: self.layer_s_BN[-1, site])
        tokens = share.streams if self.is_busy else 1
        layer_s = float(placing.attention_L(home, tokens)[0]) + self._shared_s(home, sites, tokens)
        return tokens / (self._num_layers * layer_s + float(self._return_s[home, home]))

    def _shared_s(self, home: int, sites: tuple[int, ...], tokens: int) -> float:
        """The experts of a layer, dealt out by speed."""
        placing = self._placing
        cost = placing.cost(home)
        seats = placing.seats(home, sum(1 << site for site in sites))
        speeds = np.array([seat.speed.read_gbps for seat in seats])
        counts = np.floor(cost.num_experts * speeds / speeds.sum()).astype(np.int64)
        while counts.sum() < cost.num_experts:
            counts[((counts + 1) / speeds).argmin()] += 1
        held_OHE = in_turn(counts[None, :], cost.num_experts)
        return float(
            mean(
                placing.mixes(tokens),
                lambda n: hosts_s(cost, 0, seats, held_OHE, tokens=n)[0],
            )
        )

    def _of_chains(self, share: Share) -> float:
        sites = np.array(numbers(share.sites))
        room_N = self.room_N(share.streams)[sites]
        useful = room_N >= 1
        sites, room_N = sites[useful], room_N[useful]
        if room_N.sum() < self._num_layers:
            return 0.0
        order = np.argsort(self.layer_s_BN[-1, sites], kind="stable")
        sites, room_N = sites[order], room_N[order]
        lengths = [n for n in _LENGTHS if n < len(sites)] + [len(sites)]
        lengths = [n for n in lengths if room_N[:n].sum() >= self._num_layers]
        tokens = [self._steps(length, share.streams) for length in lengths]
        # All chains at once, each with no room on the sites behind it.
        layer_s_RN = np.array([self._layer_s(each)[sites] for row in tokens for each in row])
        length_R = np.repeat(lengths, [len(row) for row in tokens])
        room_RN = np.where(np.arange(len(sites)) < length_R[:, None], room_N, 0.0)
        filled_RN = self._filled(layer_s_RN, room_RN)
        best, at = 0.0, 0
        for length, row in zip(lengths, tokens, strict=True):
            some = slice(at, at := at + len(row)), slice(length)
            chain = sites[:length], np.array(row), layer_s_RN[some], filled_RN[some]
            best = max(best, self._chain(*chain, share.streams))
        return best

    def _steps(self, length: int, streams: int) -> list[int]:
        """Sequences of a step that a chain is tried with."""
        steps = {1, length, length + 1, max(1, length // 2)} if self.is_busy else {streams}
        return sorted({-(-streams // n) for n in steps if n <= streams})

    def _layers_s(self, tokens: int) -> Matrix:
        """[N]: seconds of a layer in a step of so many sequences."""
        each = (np.interp(tokens, self._tokens_B, layer_s_B) for layer_s_B in self.layer_s_BN.T)
        return np.array(list(each))

    def _chain(
        self, sites: Matrix, tokens_B: Matrix, layer_s_BN: Matrix, filled_BN: Matrix, streams: int
    ) -> float:
        count = len(sites)
        ends_B = np.interp(tokens_B, self._tokens_B, self._ends_BN[:, sites[-1]])
        stage_s_BN = filled_BN * layer_s_BN
        stage_s_BN[:, -1] += ends_B
        slowest_B = stage_s_BN.max(axis=1)
        hops_B = np.full(len(tokens_B), float(self._return_s[np.ix_(sites, sites)].min()))
        if count > 1:
            near = np.where(np.eye(count, dtype=bool), math.inf, self.hop_s[np.ix_(sites, sites)])
            to = near.argmin(axis=0)
            carried_N = self._transfer_s[sites[to], sites]
            hops_B += near.min(axis=0)[1:].sum() + (tokens_B - 1) * carried_N[1:].sum()
            slowest_B = np.maximum(slowest_B, tokens_B * carried_N[1:].max())
        trip_B = stage_s_BN.sum(axis=1) + hops_B
        if not self.is_busy:
            return float(1 / trip_B[0])
        return float(np.minimum(tokens_B / slowest_B, streams / trip_B).max())

    def _filled(self, layer_s_BN: Matrix, room_BN: Matrix) -> Matrix:
        """[B, N]: whole layers of each site, filled to the least common time that holds all."""
        high_B = (np.minimum(room_BN, self._num_layers) * layer_s_BN).max(axis=1)
        low_B = np.zeros_like(high_B)
        for _ in range(_HALVINGS):
            middle_B = (low_B + high_B) / 2
            held_B = self._within(layer_s_BN, room_BN, middle_B).sum(axis=1)
            enough = held_B >= self._num_layers
            high_B, low_B = np.where(enough, middle_B, high_B), np.where(enough, low_B, middle_B)
        return self._within(layer_s_BN, room_BN, high_B)

    @staticmethod
    def _within(layer_s_BN: Matrix, room_BN: Matrix, limit_B: Matrix) -> Matrix:
        found: Matrix = np.minimum(np.floor(limit_B[:, None] / layer_s_BN + 1e-9), room_BN)
        return found
