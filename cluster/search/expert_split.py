"""Spread the experts of some layers over a home and its helpers: least time within their memory.

A layer chooses an option: how many experts each host holds, which takes so long. Layers are alike,
and only memory ties them together. Two mixed options are a good answer at once. Where the counts
are few the best one is found: by a dynamic programme over layers and the experts that every helper
holds so far, or by branch and bound over the ways to choose options.

    O  options      H  hosts, the home first      K  numbers of layers, from 0 on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from math import comb, prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
MOST_OPTIONS = 330
"""All ways to spread a layer are tried up to so many; 8 experts over 4 hosts have 165."""
EXACT_WORK = 60_000
"""States of the programme times options times layers, up to which it is exact."""
EXACT_CHOICES = 2_000
"""Ways to choose options for the layers, up to which branch and bound finds the best one."""
EXACT_LAYERS = 8
"""Of a model, up to which that is tried."""
_MIXED_OPTIONS = 8


def spreads(num_experts: int, num_hosts: int, solo: Callable[[], Array]) -> Array:
    """[O, H]: counts of experts per host that are worth a thought; all of them where they are few.

    `solo` tells what n experts take each host by itself, [H, n]; where there are too many ways,
    those stay in which every host takes what it can within a common time.
    """
    if comb(num_experts + num_hosts - 1, num_hosts - 1) <= MOST_OPTIONS:
        return _all_spreads(num_experts, num_hosts)
    solo_HN = solo()
    found: set[tuple[int, ...]] = {(num_experts, *(0,) * (num_hosts - 1))}
    for limit in np.unique(solo_HN[:, 1:]):
        counts = (solo_HN <= limit).cumprod(axis=1).sum(axis=1) - 1
        slowest = sorted(range(num_hosts), key=lambda host: -solo_HN[host, 1])
        while counts.sum() > num_experts:
            # What is too much is taken from whoever would be last to finish.
            held = [host for host in slowest if counts[host]]
            counts[max(held, key=lambda host: solo_HN[host, counts[host]])] -= 1
        if counts.sum() == num_experts:
            found.add(tuple(int(count) for count in counts))
    return np.array(sorted(found), dtype=np.int64)


@cache
def _all_spreads(num_experts: int, num_hosts: int) -> Array:
    bars = combinations(range(num_experts + num_hosts - 1), num_hosts - 1)
    ends = np.array([(-1, *at, num_experts + num_hosts - 1) for at in bars], dtype=np.int64)
    found: Array = np.diff(ends, axis=1) - 1
    return found


def in_turn(counts_OH: Array, num_experts: int) -> Array:
    """[O, H, E]: who holds which expert: the first ones the first host, and so on."""
    ends = counts_OH.cumsum(axis=1)[:, :, None]
    experts = np.arange(num_experts)
    found: Array = ((experts < ends) & (experts >= ends - counts_OH[:, :, None])).astype(np.int64)
    return found


class Split:
    """The best choices for every number of layers and some rooms of the home."""

    def __init__(
        self, seconds_O: Array, counts_OH: Array, *, home_VK: Array, helper_rooms: Sequence[int]
    ) -> None:
        """Rooms are in experts: `home_VK` of the home, by variant and number of layers (negative:
        none), `helper_rooms` of every helper."""
        order = np.argsort(seconds_O, kind="stable")
        self._seconds_O, self._counts_OH = seconds_O[order], counts_OH[order]
        self._home_VK = home_VK
        num_layers = home_VK.shape[1] - 1
        most = num_layers * int(counts_OH[0].sum())
        self._rooms = [min(int(room), most) for room in helper_rooms]
        self.seconds_VK = np.full(home_VK.shape, np.inf)
        """Of so many layers; inf where they do not fit."""
        self._chosen: dict[tuple[int, int], list[int]] = {}
        self._reached: dict[tuple[int, int], int] = {}
        self._layers: list[Array] = []
        num_hosts, num_experts = counts_OH.shape[1], int(counts_OH[0].sum())
        self.is_exact = len(counts_OH) == comb(num_experts + num_hosts - 1, num_hosts - 1)
        """Whether nothing is better than what was found."""
        self._solve(num_layers)

    def counts(self, variant: int, num_layers: int) -> Array:
        """[layers, H]: how many experts of each layer every host holds."""
        assert np.isfinite(self.seconds_VK[variant, num_layers])
        if self._has_quickest_VK[variant, num_layers]:
            return np.repeat(self._counts_OH[:1], num_layers, axis=0)
        at = (variant, num_layers)
        chosen = self._chosen[at] if at in self._chosen else self._walk(variant, num_layers)
        return self._counts_OH[sorted(chosen)]

    def spare(self, variant: int, num_layers: int) -> list[int]:
        """Experts that every host could hold besides those of `counts`."""
        rooms = [int(self._home_VK[variant, num_layers]), *self._rooms]
        held = self.counts(variant, num_layers).sum(axis=0)
        return [room - int(count) for room, count in zip(rooms, held, strict=True)]

    def _solve(self, num_layers: int) -> None:
        # Where the quickest option fits every layer, there is nothing to choose.
        home, *helpers = (np.arange(num_layers + 1) * count for count in self._counts_OH[0])
        fits_VK = self._home_VK >= home
        for held, room in zip(helpers, self._rooms, strict=True):
            fits_VK &= held <= room
        fits_VK[:, 0] = False
        self._has_quickest_VK = fits_VK
        self.seconds_VK[fits_VK] = fits_VK.nonzero()[1] * self._seconds_O[0]
        open_VK = (self._home_VK >= 0) & ~np.isfinite(self.seconds_VK)
        num_experts = int(self._counts_OH[0].sum())
        needed_K = num_experts * np.arange(num_layers + 1)
        open_VK &= self._home_VK + sum(self._rooms) >= needed_K
        open_VK[:, 0] = False
        if not open_VK.any():
            return
        states = prod(room + 1 for room in self._rooms)
        if states * len(self._seconds_O) * num_layers <= EXACT_WORK:
            self._programme(num_layers, open_VK)
        else:
            self._mix(num_layers, open_VK)
            for variant, k in np.argwhere(open_VK):
                ways = comb(len(self._seconds_O) + int(k) - 1, int(k))
                if num_layers <= EXACT_LAYERS and ways <= EXACT_CHOICES:
                    self._branch(int(variant), int(k))
                else:
                    self.is_exact = False

    def _programme(self, num_layers: int, open_VK: Array) -> None:
        """States are numbers of experts that the helpers hold, flat; there is one more that none
        can be reached from."""
        shape = tuple(room + 1 for room in self._rooms)
        held_SH = np.indices(shape).reshape(len(shape), -1).T
        num_states, num_experts = len(held_SH), int(self._counts_OH[0].sum())
        before_OSH = held_SH - self._counts_OH[:, None, 1:]
        strides = np.array([prod(shape[at + 1 :]) for at in range(len(shape))], dtype=np.int64)
        self._before_OS = np.where((before_OSH >= 0).all(axis=2), before_OSH @ strides, num_states)
        best = np.full(num_states + 1, np.inf)
        best[0] = 0.0
        held_S = held_SH.sum(axis=1)
        states = np.arange(num_states)
        for k in range(1, num_layers + 1):
            reached_OS = best[self._before_OS] + self._seconds_O[:, None]
            choice = reached_OS.argmin(axis=0)
            best[:-1] = reached_OS[choice, states]
            self._layers.append(choice)
            variants = np.flatnonzero(open_VK[:, k])
            fits_VS = k * num_experts - held_S <= self._home_VK[variants, k, None]
            within_VS = np.where(fits_VS, best[:-1], np.inf)
            at_V = within_VS.argmin(axis=1)
            self.seconds_VK[variants, k] = within_VS[np.arange(len(variants)), at_V]
            for variant, at in zip(variants, at_V, strict=True):
                self._reached[int(variant), k] = int(at)

    def _walk(self, variant: int, num_layers: int) -> list[int]:
        state, chosen = self._reached[variant, num_layers], []
        for choice in reversed(self._layers[:num_layers]):
            option = int(choice[state])
            chosen.append(option)
            state = int(self._before_OS[option, state])
        return chosen

    def _mix(self, num_layers: int, open_VK: Array) -> None:
        """The best pair of options: one for some layers, and one that is no quicker for the rest.
        The room of a host says how many layers the first may have at most, or must have."""
        some = self._useful()
        one_P, other_P = (some[each] for each in np.triu_indices(len(some)))
        ones_PH, others_PH = self._counts_OH[one_P], self._counts_OH[other_P]
        variant_R, k_R = np.nonzero(open_VK)
        most = num_layers * int(self._counts_OH[0].sum())
        home_R = np.minimum(self._home_VK[variant_R, k_R], most).astype(np.int64)
        most_RP = np.repeat(k_R[:, None], len(one_P), axis=1)
        least_RP = np.zeros_like(most_RP)
        for host, room in enumerate((home_R[:, None], *self._rooms)):
            more_P = ones_PH[:, host] - others_PH[:, host]
            spare_RP = room - others_PH[:, host] * k_R[:, None]
            layers_RP = spare_RP // np.maximum(np.abs(more_P), 1)
            np.minimum(most_RP, layers_RP, out=most_RP, where=more_P > 0)
            np.maximum(least_RP, -layers_RP, out=least_RP, where=more_P < 0)
            most_RP[(more_P == 0) & (spare_RP < 0)] = -1
        seconds_P, others_P = self._seconds_O[one_P], self._seconds_O[other_P]
        at_RP = np.where(seconds_P < others_P, most_RP, least_RP)
        mixed_RP = seconds_P * at_RP + others_P * (k_R[:, None] - at_RP)
        mixed_RP[least_RP > most_RP] = np.inf
        pair_R = mixed_RP.argmin(axis=1)
        for row, (variant, k, pair) in enumerate(zip(variant_R, k_R, pair_R, strict=True)):
            if np.isfinite(mixed_RP[row, pair]):
                number = int(at_RP[row, pair])
                self.seconds_VK[variant, k] = mixed_RP[row, pair]
                mixed = [int(one_P[pair])] * number + [int(other_P[pair])] * int(k - number)
                self._chosen[int(variant), int(k)] = mixed

    def _branch(self, variant: int, num_layers: int) -> None:
        """Options in ascending order: what follows one takes at least as long as it."""
        seconds_O = [float(seconds) for seconds in self._seconds_O]
        counts_OH = [tuple(int(n) for n in row) for row in self._counts_OH]
        best, found = float(self.seconds_VK[variant, num_layers]), None

        def descend(least: int, chosen: tuple[int, ...], spent: float, rooms: list[float]) -> None:
            nonlocal best, found
            left = num_layers - len(chosen)
            if not left:
                best, found = spent, chosen
                return
            for option in range(least, len(seconds_O)):
                if spent + left * seconds_O[option] >= best * (1 - 1e-12):
                    return
                rest = [room - n for room, n in zip(rooms, counts_OH[option], strict=True)]
                if min(rest) >= 0:
                    descend(option, (*chosen, option), spent + seconds_O[option], rest)

        descend(0, (), 0.0, [float(self._home_VK[variant, num_layers]), *self._rooms])
        if found is not None:
            self.seconds_VK[variant, num_layers] = best
            self._chosen[variant, num_layers] = list(found)

    def _useful(self) -> Array:
        """Options that are quickest, or quickest among those that spare a host."""
        kept = set(range(min(_MIXED_OPTIONS, len(self._seconds_O))))
        for host in range(self._counts_OH.shape[1]):
            least = np.inf
            for option, count in enumerate(self._counts_OH[:, host]):
                if count < least:
                    least = count
                    kept.add(option)
        return np.array(sorted(kept)[: 3 * _MIXED_OPTIONS], dtype=np.int64)
