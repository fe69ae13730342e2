"""What stages take at least, for every home, every set of members and every number of layers.

Closed forms for all sets at once, where the search weighs each stage by itself: a layer is taken to
be the cheapest of all, and how the experts of a stage are spread over its members is only bounded:

* a layer's experts take no less than with the best help that its members can give (memory aside);
* a host is busy with every expert of the stage that it holds, as long as its memory allows: the
  least common time in which all members hold all experts is a bound on the slowest;
* a step needs some expert: whoever holds it is a bound, and on average experts are at best where
  they are done soonest, as far as memory allows.

    M  sets of members      K  numbers of layers, from 0 on      N  sites, the home among them
"""

from __future__ import annotations

from functools import partial
from math import comb

import numpy as np

from .cost import ModelCost, transfer_s
from .expert_cost import (
    Array,
    Seat,
    asked_host_s,
    expert_rows_s,
    hit_chance,
    least_hosts_s,
    one_expert_H,
)
from .mix import mean
from .placing import Placing

_TINY = 1e-9
"""Experts per second that are none."""


def stage_floors(placing: Placing, tokens: int) -> Array:
    """[home, M, K]: seconds that a stage takes at least in a step of so many sequences; inf where
    it does not fit or may not be. M is a bit mask over the places."""
    problem = placing.problem(tokens)
    count, num_layers = len(problem.sites), problem.num_layers
    found = np.full((count, 1 << count, num_layers + 1), np.inf)
    layers = np.arange(num_layers + 1)
    helpers = sum(1 << site for site in range(count) if problem.may_help(site))
    for home, site in enumerate(problem.sites):
        alone = layers * float(np.diff(site.seconds_L).min())
        fits = layers * float(np.diff(site.needs_L).min()) <= site.capacity
        found[home, 1 << home] = np.where(fits, alone, np.inf)
        if problem.shared is not None:
            masks = np.arange(1 << count)
            others = masks & ~(1 << home)
            masks = masks[(masks >> home & 1 > 0) & (others > 0) & (others & ~helpers == 0)]
            if len(masks):
                found[home, masks] = _Sharing(placing, home, tokens).floors_MK(masks)
        if site.span is not None:
            found[home, :, layers != site.span[1] - site.span[0]] = np.inf
    found[:, :, 0] = np.inf
    return found


class _Sharing:
    """Stages of one home whose experts may be on helpers."""

    def __init__(self, placing: Placing, home: int, tokens: int) -> None:
        self._placing, self._home = placing, home
        self._cost = cost = placing.cost(home)
        self._layer = layer = cost.expert_bytes.index(min(cost.expert_bytes))
        self._problem = placing.problem(tokens)
        count = len(self._problem.sites)
        self._tokens, self._mixes = tokens, placing.mixes(tokens)
        self._seats = [placing.seat(home, site) for site in range(count)]
        asked = np.array([self._asked_s(seat) for seat in self._seats])

        def one_N(n: int) -> Array:
            return one_expert_H(cost, layer, self._seats, tokens=n)

        one = mean(self._mixes, one_N)
        busy = mean(self._mixes, lambda n: hit_chance(cost, n) * one_N(n))
        rows = mean(
            self._mixes, lambda n: np.array([_rows_s(cost, seat, n) for seat in self._seats])
        )
        self._asked_N, self._rows_N, self._computed_N = asked, rows, busy
        self._card_N = np.array([_row_s(cost, seat) for seat in self._seats])
        # A step needs a host at least as often as the share of the experts that it has.
        self._mean_N = (one + asked + rows) / cost.num_experts
        self._busy_N = busy + asked / cost.num_experts + rows

    def _asked_s(self, seat: Seat) -> float:
        if seat.link is None:
            return 0.0
        steps = mean(self._mixes, lambda _: 1.0)
        return steps * asked_host_s(self._seats[self._home].speed, seat.link)

    def floors_MK(self, masks: Array) -> Array:
        """Of stages with the members `masks`, home included."""
        placing, home, cost = self._placing, self._home, self._cost
        layers = np.arange(self._problem.num_layers + 1)
        experts_K = (cost.num_experts * layers).astype(float)
        present_MN = masks[:, None] >> np.arange(len(self._seats)) & 1 > 0
        room_K, rooms_MN = self._rooms(layers, present_MN)
        fits_MK = (room_K >= 0) & (room_K + rooms_MN.sum(axis=1)[:, None] >= experts_K)
        room_K = np.maximum(room_K, 0.0)
        help_M = mean(self._mixes, partial(self._help_M, masks, present_MN))
        shared_MK = help_M[:, None] * layers
        # Rows to one helper pass its link; those to all of them, the one network card of the home.
        alone_M = np.zeros(len(masks))
        carried_M = self._least_away(present_MN, self._asked_N / cost.num_experts + self._rows_N)
        for found_MK in (
            self._filled_MK(room_K, rooms_MN, experts_K, self._busy_N, alone_M),
            self._filled_MK(room_K, rooms_MN, experts_K, self._computed_N, carried_M),
            self._soonest_MK(room_K, rooms_MN, experts_K),
            self._at_home_MK(room_K, present_MN, layers),
        ):
            np.maximum(shared_MK, found_MK, out=shared_MK)
        own_s = min(placing.attention_L(home, self._tokens))
        found: Array = np.where(fits_MK, shared_MK + own_s * layers, np.inf)
        return found

    def _help_M(self, masks: Array, present_MN: Array, tokens: int) -> Array:
        """Of a layer's experts with the best help; whatever else the memory is for."""
        known, members = self._placing.known, int(masks[-1])
        key = ("help", self._placing.sharing_key(self._home, members), masks.tobytes(), tokens)
        if key not in known:
            cost, layer = self._cost, self._layer
            known[key] = least_hosts_s(cost, layer, self._seats, present_MN, tokens=tokens)
        found: Array = known[key]
        return found

    def _least_away(self, present_MN: Array, each_N: Array) -> Array:
        """[M]: the least of the helpers."""
        away_MN = present_MN.copy()
        away_MN[:, self._home] = False
        found: Array = np.where(away_MN, each_N, np.inf).min(axis=1)
        return found

    def _rooms(self, layers: Array, present_MN: Array) -> tuple[Array, Array]:
        """[K] experts that the home has room for, negative: none for its own work; [M, N] those of
        helpers that are present."""
        placing, home, cost = self._placing, self._home, self._cost
        expert = cost.expert_bytes[self._layer]
        usable = np.array([place.usable_bytes for place in placing.places], dtype=float)
        room_N = np.maximum(np.floor((usable - placing.helper_overhead_bytes(home)) / expert), 0.0)
        room_N[home] = 0.0
        own = min(cost.attention_bytes) + placing.kv_bytes
        room_K = np.floor((self._problem.sites[home].capacity - layers * own) / expert)
        return room_K, room_N * present_MN

    def _filled_MK(
        self, room_K: Array, rooms_MN: Array, experts_K: Array, each_N: Array, away_M: Array
    ) -> Array:
        """The least time in which all experts are on some member, where an expert takes each
        helper so long, and besides every one that is not at home all of them, one after another.

        Helpers that are full before that hold what they can, and the others share the rest by
        speed; with any set taken to be full it is a bound. So much is left to the helpers as the
        home has no room for, or, if that is more, no time.
        """
        home_s = self._busy_N[self._home]
        order = np.argsort(rooms_MN.max(axis=0) * each_N, kind="stable")
        full_M = np.zeros(len(rooms_MN))
        speed_M = (rooms_MN > 0) @ (1 / each_N)
        no_room_K = np.maximum(experts_K - room_K, 0.0)
        found = np.zeros((len(rooms_MN), len(room_K)))
        for host in order:
            with np.errstate(divide="ignore"):
                inverse_M = np.where(speed_M > _TINY, 1 / speed_M, 0.0)
            # Seconds with no room at home, and with no time.
            _raise(found, away_M + inverse_M, no_room_K, full_M * inverse_M)
            slower_M = 1 / (speed_M + (1 + away_M * speed_M) / home_s)
            _raise(found, (1 + away_M * speed_M) * slower_M, experts_K, full_M * slower_M)
            full_M = full_M + rooms_MN[:, host]
            speed_M = np.maximum(speed_M - (rooms_MN[:, host] > 0) / each_N[host], 0.0)
        # With all of them full the rest is left to the home.
        _raise(found, np.full(len(full_M), home_s), experts_K, home_s * full_M)
        return found

    def _at_home_MK(self, room_K: Array, present_MN: Array, layers: Array) -> Array:
        """By how many experts of a layer stay at home, on average no more than it has room for.

        While the home computes these, all others are asked for: their rows pass the one network
        card of the home, and then some helper computes no fewer than if all were equally busy.
        """
        num_experts = self._cost.num_experts
        away_MN = present_MN.copy()
        away_MN[:, self._home] = False
        counts = np.arange(num_experts + 1)
        # The n-th of all moments at which a helper is done with one more, with no room for less.
        busy_NE = self._computed_N[:, None] * counts[1:]
        busy_ME = np.where(away_MN[:, :, None], busy_NE, np.inf).reshape(len(away_MN), -1)
        found_MH = np.zeros((len(away_MN), num_experts + 1))
        found_MH[:, :-1] = np.sort(busy_ME, axis=1)[:, :num_experts][:, ::-1]
        gone = num_experts - counts
        asked_M = self._least_away(present_MN, self._asked_N)
        card_M = self._least_away(present_MN, self._card_N)
        found_MH += asked_M[:, None] * self._chances()[gone] + card_M[:, None] * self._rows()[gone]
        np.maximum(found_MH, counts * self._computed_N[self._home], out=found_MH)
        # Layers may differ in it: the mean of two numbers takes the mean of their times.
        hull_MH = np.minimum.accumulate(_convex(found_MH), axis=1)
        mean_K = np.clip(room_K / np.maximum(layers, 1), 0.0, num_experts)
        below_K = np.minimum(mean_K.astype(np.int64), num_experts - 1)
        share_K = mean_K - below_K
        least_MK = hull_MH[:, below_K] * (1 - share_K) + hull_MH[:, below_K + 1] * share_K
        found: Array = least_MK * layers
        return found

    def _without(self) -> Array:
        """The chance that a token needs none of n experts, by n from 0 on."""
        num_experts, per_token = self._cost.num_experts, self._cost.experts_per_token
        ways = np.array([comb(num_experts - n, per_token) for n in range(num_experts + 1)], float)
        found: Array = ways / ways[0]
        return found

    def _chances(self) -> Array:
        """Of steps that need one of n experts, by n from 0 on."""
        # Where there are more steps than one, they count with what each is asked for.
        single = [tuple((w / sum(w for w, _ in mix), n) for w, n in mix) for mix in self._mixes]
        return mean(single, lambda n: 1 - self._without() ** n)

    def _rows(self) -> Array:
        """Rows there and back for n experts, by n from 0 on: fewest if one host has all of them."""
        tokens = mean(self._mixes, float)
        shares = np.arange(self._cost.num_experts + 1) / self._cost.num_experts
        found: Array = tokens * (1 - self._without() + self._cost.experts_per_token * shares)
        return found

    def _soonest_MK(self, room_K: Array, rooms_MN: Array, experts_K: Array) -> Array:
        """Experts on the hosts that are done with one soonest, as far as these have room."""
        found = np.zeros((len(rooms_MN), len(room_K)))
        left = np.broadcast_to(experts_K, found.shape)
        for host in np.argsort(self._mean_N, kind="stable"):
            room = room_K if host == self._home else rooms_MN[:, host, None]
            held = np.minimum(left, room)
            found += held * self._mean_N[host]
            left = left - held
        return found


def _raise(found_MK: Array, slope_M: Array, numbers_K: Array, less_M: Array) -> None:
    """To so much for each number, less something, where that is more."""
    line_MK = slope_M[:, None] * numbers_K
    line_MK -= less_M[:, None]
    np.maximum(found_MK, line_MK, out=found_MK)


def _convex(found_MH: Array) -> Array:
    """The greatest convex functions of H below these, row by row."""
    numbers = np.arange(found_MH.shape[1])
    hull_MH, at_M1 = found_MH.copy(), np.zeros((len(found_MH), 1), dtype=np.int64)
    while (at_M1 < numbers[-1]).any():
        now_M1 = np.take_along_axis(found_MH, at_M1, axis=1)
        ahead_MH = numbers - at_M1
        slope_MH = np.where(ahead_MH > 0, found_MH - now_M1, np.inf) / np.maximum(ahead_MH, 1)
        next_M1 = np.where(at_M1 < numbers[-1], slope_MH.argmin(axis=1)[:, None], at_M1)
        rise_M1 = np.take_along_axis(found_MH, next_M1, axis=1) - now_M1
        chord_MH = now_M1 + rise_M1 * ahead_MH / np.maximum(next_M1 - at_M1, 1)
        between_MH = (numbers > at_M1) & (numbers < next_M1)
        np.copyto(hull_MH, chord_MH, where=between_MH)
        at_M1 = next_M1
    return hull_MH


def _rows_s(cost: ModelCost, seat: Seat, tokens: int) -> float:
    return 0.0 if seat.link is None else expert_rows_s(cost, seat.link, tokens=tokens)


def _row_s(cost: ModelCost, seat: Seat) -> float:
    return 0.0 if seat.link is None else transfer_s(cost.hidden_bytes, seat.link)
