"""What a layer's experts cost when several devices hold them: the slowest host decides.

A step needs a random *set* of experts. Which sets are how likely follows exactly from how often a
token needs each expert, so that the expected time of the slowest host is exact too: the time of
every set, weighed. The maximum of the mean times would be too hopeful: one token on eight hosts of
one expert each takes a whole expert's time, not a quarter of it.

    S  sets of experts, as bit masks, 2^E      O  options of placing them      H  hosts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..machines import Link
from .cost import ModelCost, Speed, expert_flops, roofline_s, transfer_s

Array: TypeAlias = "npt.NDArray[Any]"
MOST_EXACT_EXPERTS = 12
"""Of a layer; with more of them, sets are too many, and every host is taken at its mean."""

_NEVER = 1e-12
"""Chances of sets that are not looked at: prompts need all experts but in one of 1e60 steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A device that may hold experts of a layer."""

    speed: Speed
    link: Link | None = None
    """To it from the device with the layer's attention; None: it is that device."""


@cache
def token_weights(popularity: tuple[float, ...], per_token: int) -> tuple[float, ...]:
    """Weights with which drawing `per_token` different experts hits each as often as measured.

    A set is drawn in proportion to the product of its weights (conditional Bernoulli sampling),
    the least assuming distribution with the given shares. They sum up to `per_token`; experts
    that were never or always needed are kept a little away from that.
    """
    shares = np.clip(np.asarray(popularity, dtype=float), 1e-6, 1 - 1e-6)
    shares *= per_token / shares.sum()
    weights = shares.copy()
    for _ in range(100):
        whole = _symmetric(weights, per_token)[per_token]
        without = [
            _symmetric(np.delete(weights, e), per_token)[per_token - 1] for e in range(len(weights))
        ]
        hit = weights * np.array(without) / whole
        weights *= shares / hit
    return tuple(weights / weights.max())


def _symmetric(weights: Array, degree: int) -> Array:
    """Elementary symmetric polynomials of the degrees 0 to `degree`."""
    found = np.zeros(degree + 1)
    found[0] = 1.0
    for weight in weights:
        found[1:] += weight * found[:-1].copy()
    return found


@cache
def within_sets(num_experts: int, per_token: int, weights: tuple[float, ...] | None) -> Array:
    """[S]: the probability that all experts of one token lie in each set."""
    found = np.zeros((1, per_token + 1))
    found[0, 0] = 1.0
    for weight in weights or (1.0,) * num_experts:
        joined = found.copy()
        joined[:, 1:] += weight * found[:, :-1]
        found = np.concatenate([found, joined])
    result: Array = found[:, per_token] / found[-1, per_token]
    return result


@cache
def hit_sets(
    num_experts: int, per_token: int, tokens: int, weights: tuple[float, ...] | None = None
) -> Array:
    """[S]: the probability that a step of `tokens` tokens needs exactly each set of experts."""
    found = within_sets(num_experts, per_token, weights) ** tokens
    for expert in range(num_experts):
        halves = found.reshape(-1, 2, 1 << expert)
        halves[:, 1] -= halves[:, 0]
    result: Array = np.maximum(found, 0.0)
    return result


def hosts_s(
    model: ModelCost,
    layer: int,
    seats: Sequence[Seat],
    held_OHE: Array,
    *,
    tokens: int,
    weights: tuple[float, ...] | None = None,
) -> Array:
    """[O]: expected time of a layer's experts on `seats`, for each option of who holds which.

    ``held_OHE`` says whether a host holds an expert; each expert has one host. A host is done when
    the rows have come, its share is computed and the results are back; the layer, when its slowest
    host is. `weights` are those of `token_weights`; without them all experts are alike.
    """
    if model.num_experts <= MOST_EXACT_EXPERTS:
        return _over_sets(model, layer, seats, held_OHE, tokens=tokens, weights=weights)
    return _of_means(model, layer, seats, held_OHE, tokens=tokens)


def least_hosts_s(
    model: ModelCost, layer: int, seats: Sequence[Seat], present_MH: Array, *, tokens: int
) -> Array:
    """[M]: less than which no choice of hosts among the `seats` that are present, and of who holds
    what, can take.

    Of d experts that a step needs, each is one more for some host; if every host had exactly those
    that suit it best, they would be done at the d-th of all moments at which a host is done with
    one more. Rows of one expert travel at least.
    """
    each_H = one_expert_H(model, layer, seats, tokens=tokens)
    away_H = np.array([_least_away_s(model, seat.link, tokens=tokens) for seat in seats])
    is_exact = model.num_experts <= MOST_EXACT_EXPERTS
    if not is_exact:
        each_H *= hit_chance(model, tokens)
    done_HD = away_H[:, None] + each_H[:, None] * np.arange(1, model.num_experts + 1)
    done_MHD = np.where(present_MH[:, :, None], done_HD, np.inf)
    done_MD = np.sort(done_MHD.reshape(len(present_MH), -1), axis=1)[:, : model.num_experts]
    if not is_exact:
        last: Array = done_MD[:, -1]
        return last
    chance_S = hit_sets(model.num_experts, model.experts_per_token, tokens)
    chance_D = np.bincount(_bits(model.num_experts), weights=chance_S)[1:]
    found: Array = done_MD @ chance_D
    return found


def hit_chance(model: ModelCost, tokens: int) -> float:
    """The probability that a step needs an expert."""
    return 1 - (1 - model.experts_per_token / model.num_experts) ** tokens


def one_expert_s(model: ModelCost, layer: int, speed: Speed, *, tokens: int) -> float:
    """One expert that a step needs: its bytes, or the operations of its share of the tokens."""
    share = tokens * model.experts_per_token / model.num_experts
    return roofline_s(model.expert_bytes[layer], share * expert_flops(model, layer), speed)


def one_expert_H(model: ModelCost, layer: int, seats: Sequence[Seat], *, tokens: int) -> Array:
    """The same on each seat."""
    share = tokens * model.experts_per_token / model.num_experts
    read_gbps = np.array([seat.speed.read_gbps for seat in seats])
    gemm_gflops = np.array([seat.speed.gemm_gflops for seat in seats])
    found: Array = np.maximum(
        model.expert_bytes[layer] / (read_gbps * 1e9),
        share * expert_flops(model, layer) / (gemm_gflops * 1e9),
    )
    return found


def asked_host_s(home: Speed, link: Link) -> float:
    """What a host takes longer in a step that needs any of its experts, however few rows come."""
    return 2 * link.overhead_s + link.rtt_s + home.helper_overhead_s


def expert_rows_s(model: ModelCost, link: Link, *, tokens: int) -> float:
    """Of `expert_rows_bytes` on a link."""
    return transfer_s(expert_rows_bytes(model, tokens=tokens), link)


def expert_rows_bytes(model: ModelCost, *, tokens: int) -> float:
    """Rows and outputs for every expert of a host, on average and at least: of all experts a host
    gets each row once, of some no less than their share of that."""
    return tokens * (1 + model.experts_per_token) / model.num_experts * model.hidden_bytes


def _least_away_s(model: ModelCost, link: Link | None, *, tokens: int) -> float:
    if link is None:
        return 0.0
    rows = tokens * model.experts_per_token / model.num_experts * model.hidden_bytes
    return 2 * (link.overhead_s + link.rtt_s / 2 + transfer_s(rows, link))


def _over_sets(
    model: ModelCost,
    layer: int,
    seats: Sequence[Seat],
    held_OHE: Array,
    *,
    tokens: int,
    weights: tuple[float, ...] | None,
) -> Array:
    num_experts, per_token = model.num_experts, model.experts_per_token
    masks_OH = held_OHE @ (1 << np.arange(num_experts))
    within_S = within_sets(num_experts, per_token, weights)
    chance_S = hit_sets(num_experts, per_token, tokens, weights)
    likely = np.flatnonzero(chance_S > _NEVER)
    bits_S = _bits(num_experts)
    # A token needs a host unless all of its experts lie outside of it.
    reach_OH = 1 - within_S[(1 << num_experts) - 1 - masks_OH]
    hit_OHS = bits_S[masks_OH[:, :, None] & likely]
    needed_E = 1 - within_S[(1 << num_experts) - 1 - (1 << np.arange(num_experts))]
    time_OHS = _hosts_time(
        model, layer, seats, reach_OH, hit_OHS, held_OHE @ needed_E, tokens=tokens
    )
    result: Array = time_OHS.max(axis=1) @ chance_S[likely]
    return result


def _of_means(
    model: ModelCost, layer: int, seats: Sequence[Seat], held_OHE: Array, *, tokens: int
) -> Array:
    num_experts, per_token = model.num_experts, model.experts_per_token
    count_OH = held_OHE.sum(axis=2)
    none = [comb(num_experts - held, per_token) for held in range(num_experts + 1)]
    reach_OH = 1 - np.array(none, dtype=float)[count_OH] / none[0]
    hit = 1 - (1 - per_token / num_experts) ** tokens
    likely_OH = np.maximum(1 - (1 - reach_OH) ** tokens, 1e-12)
    mean_OHS = (count_OH * hit / likely_OH)[:, :, None]
    needed_OH = count_OH * (per_token / num_experts)
    time_OHS = _hosts_time(model, layer, seats, reach_OH, mean_OHS, needed_OH, tokens=tokens)
    result: Array = time_OHS.max(axis=(1, 2))
    return result


def _hosts_time(
    model: ModelCost,
    layer: int,
    seats: Sequence[Seat],
    reach_OH: Array,
    hit_OHS: Array,
    needed_OH: Array,
    *,
    tokens: int,
) -> Array:
    """[O, H, S]: the time of each host when so many of its experts are hit.

    `reach_OH` is the part of all tokens that need a host, `needed_OH` how many of its experts a
    token needs on average.
    """
    # Each row goes once to a host that it needs, and every output of an expert comes back.
    likely_OH = np.maximum(1 - (1 - reach_OH) ** tokens, 1e-12)
    rows_OH, outputs_OH = tokens * reach_OH / likely_OH, tokens * needed_OH / likely_OH
    is_hit = hit_OHS > 0
    away = [seat.link is not None for seat in seats]
    # Rows to and from all helpers pass the one network card of the home.
    card_gbps = max((seat.link.gbps for seat in seats if seat.link is not None), default=1.0)
    both_OH = (rows_OH + outputs_OH) * model.hidden_bytes
    card_OS = ((both_OH * away)[:, :, None] * is_hit).sum(axis=1) / (card_gbps * 1e9)
    home_s = next((seat.speed.helper_overhead_s for seat in seats if seat.link is None), 0.0)
    found = np.zeros(np.broadcast_shapes(is_hit.shape, (*rows_OH.shape, 1)))
    flops = expert_flops(model, layer)
    for number, seat in enumerate(seats):
        hit_OS = hit_OHS[:, number]
        read = hit_OS * (model.expert_bytes[layer] / (seat.speed.read_gbps * 1e9))
        compute = tokens * needed_OH[:, number] * flops / (seat.speed.gemm_gflops * 1e9)
        seconds = np.maximum(read, compute[:, None])
        if seat.link is not None:
            wire = both_OH[:, number] / (seat.link.gbps * 1e9)
            carried = np.maximum(wire[:, None], card_OS)
            seconds = seconds + 2 * seat.link.overhead_s + seat.link.rtt_s + carried + home_s
        found[:, number] = np.where(is_hit[:, number], seconds, 0.0)
    return found


@cache
def _bits(num_experts: int) -> Array:
    """[S]: how many experts a set has."""
    found = np.zeros(1, dtype=np.int8)
    for _ in range(num_experts):
        found = np.concatenate([found, found + 1])
    return found
