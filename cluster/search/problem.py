"""The placement problem in seconds and bytes, free of models and machines, and what a route costs.

A stage has a home, which computes attention and hands the step on, and possibly helpers that hold
some of its experts. Its members, home included, are a bit mask over sites; no site has two stages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Matrix: TypeAlias = "npt.NDArray[np.floating[Any]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A device with what its stages would cost. Arrays are prefix sums over layers, [L + 1]."""

    seconds_L: Matrix
    needs_L: Matrix
    """Bytes of the layers."""
    capacity: float
    """Bytes for them; less than any layer: of no use."""
    first_s: float = 0.0
    last_s: float = 0.0
    """Added to the first and the last stage of the model."""
    first_bytes: float = 0.0
    last_bytes: float = 0.0
    span: tuple[int, int] | None = None
    """Layers that it must hold, and no other ones, if it is used; only it may hold them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Least:
    """What layers cost at least, whoever else is in their stage; the ground of `bound.py`.

    Matrices are [site, layer]. A layer has work of its own, which only the home of its stage does,
    and experts, which any member may hold; where nobody may help, all of a layer is its own.
    """

    layer_NL: Matrix
    """Seconds of a layer on a home, with the best help that there may be."""
    own_NL: Matrix
    """Seconds of its own work."""
    expert_NL: Matrix
    """Seconds that each expert occupies its host, on average."""
    one_expert_NL: Matrix
    """Seconds of an expert that a step needs."""
    own_bytes_NL: Matrix
    expert_bytes_L: Matrix
    helper_capacity_N: Matrix
    """Bytes for experts on a site without a stage of its own."""
    asked_NN: Matrix
    """[home, host]: seconds that a host takes longer in a step that needs it, with no row yet."""
    rows_NN: Matrix
    """[home, host]: seconds of the rows of one expert there and back, on average."""
    num_experts: int = 0
    """Of a layer, that may be elsewhere; 0: nobody may help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One placement problem at one number of sequences per step."""

    sites: tuple[Site, ...]
    hop_s: Matrix
    """[i, j]: from a stage on i to the next on j."""
    return_s: Matrix
    """[i, j]: from the last stage on i back to the first on j."""
    transfer_s: Matrix
    """[i, j]: how long a step occupies the link from i to j."""
    step_tokens: int
    streams: int
    shared: Callable[[int, int], Matrix] | None = None
    """(home, members): [u, v] seconds of layers [u, v) with experts on all members, inf where
    they do not fit; None: every stage has one site."""
    least_shared: Callable[[], Least] | None = None
    """Given with `shared`."""

    @property
    def least(self) -> Least:
        """What layers cost at least."""
        if self.least_shared is not None:
            return self.least_shared()
        seconds = np.array([np.diff(site.seconds_L) for site in self.sites])
        return Least(
            layer_NL=seconds,
            own_NL=seconds,
            expert_NL=np.zeros_like(seconds),
            one_expert_NL=np.zeros_like(seconds),
            own_bytes_NL=np.array([np.diff(site.needs_L) for site in self.sites]),
            expert_bytes_L=np.zeros(self.num_layers),
            helper_capacity_N=np.array([site.capacity for site in self.sites]),
            asked_NN=np.zeros_like(self.hop_s),
            rows_NN=np.zeros_like(self.hop_s),
        )

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.sites[0].seconds_L) - 1

    def stage_LL(self, home: int, members: int) -> Matrix:
        """[u, v]: seconds of a stage with layers [u, v), inf where it may not be."""
        if members == 1 << home:
            found = _alone(self.sites[home], self.num_layers)
        else:
            assert self.shared is not None
            found = self.shared(home, members)
        spans = {site.span for site in self.sites if site.span is not None}
        return _within_spans(found, self.sites[home].span, spans) if spans else found

    def may_help(self, site: int) -> bool:
        """Whether a site may hold experts of a stage elsewhere."""
        return self.sites[site].span is None


def _alone(site: Site, num_layers: int) -> Matrix:
    needs = site.needs_L[None, :] - site.needs_L[:, None]
    seconds = site.seconds_L[None, :] - site.seconds_L[:, None]
    needs[0] += site.first_bytes
    seconds[0] += site.first_s
    needs[:, -1] += site.last_bytes
    seconds[:, -1] += site.last_s
    layers = np.arange(num_layers + 1)
    fits = (needs <= site.capacity) & (layers[None, :] > layers[:, None])
    return np.where(fits, seconds, np.inf)


def _within_spans(
    stage_LL: Matrix, own: tuple[int, int] | None, spans: set[tuple[int, int]]
) -> Matrix:
    found = np.full_like(stage_LL, np.inf)
    if own is not None:
        found[own] = stage_LL[own]
        return found
    layers = np.arange(len(stage_LL))
    free = np.ones_like(stage_LL, dtype=bool)
    for start, end in spans:
        free &= (layers[None, :] <= start) | (layers[:, None] >= end)
    found[free] = stage_LL[free]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """Stages in pipeline order: the home of each, its members, and its end layer."""

    sites: tuple[int, ...]
    members: tuple[int, ...]
    ends: tuple[int, ...]
    stages_s: tuple[float, ...]
    round_trip_s: float
    bottleneck_s: float

    @property
    def starts(self) -> tuple[int, ...]:
        """The first layer of each stage."""
        return (0, *self.ends[:-1])

    def tokens_per_s(self, problem: Problem) -> float:
        """What the throughput goal maximises."""
        return min(problem.step_tokens / self.bottleneck_s, problem.streams / self.round_trip_s)


class Outlook(Protocol):
    """What routes of one problem can be at best, as far as that is known without a search."""

    @property
    def most(self) -> float:
        """Tokens per second that none exceeds."""
        ...

    def hopeful(self, least: float) -> set[tuple[int, int]]:
        """Home and members of all stages of those with at least so many tokens per second."""
        ...

    def may_yield(self, least: float, stages: Sequence[tuple[int, int]]) -> bool:
        """Whether a route of just these stages may have so many tokens per second."""
        ...

    def ideals(self) -> list[tuple[tuple[int, int], ...]]:
        """Homes and members of the stages that would have the most, were they as quick as it takes
        them to be: some sets of them, in no order. Real routes of them are good starts."""
        ...


def evaluate(
    problem: Problem,
    sites: Sequence[int],
    ends: Sequence[int],
    members: Sequence[int] | None = None,
    stages_s: Sequence[float] | None = None,
) -> Route:
    """A given route with its times. Stages on one site take turns; memory is not checked.

    `stages_s` are the seconds of its stages, where these are known better.
    """
    starts = (0, *ends[:-1])
    masks = tuple(members) if members is not None else tuple(1 << site for site in sites)
    if stages_s is None:
        spans = zip(sites, masks, starts, ends, strict=True)
        stages_s = [_stage_s(problem, *span) for span in spans]
    busy: defaultdict[int, float] = defaultdict(float)
    for home, seconds in zip(sites, stages_s, strict=True):
        busy[home] += seconds
    pairs = list(pairwise(sites))
    hops = [float(problem.hop_s[i, j]) for i, j in pairs]
    transfers = [float(problem.transfer_s[i, j]) for i, j in pairs]
    back = float(problem.return_s[sites[-1], sites[0]])
    return Route(
        sites=tuple(sites),
        members=masks,
        ends=tuple(ends),
        stages_s=tuple(stages_s),
        round_trip_s=sum(stages_s) + sum(hops) + back,
        bottleneck_s=max([*busy.values(), *transfers]),
    )


def _stage_s(problem: Problem, home: int, members: int, start: int, end: int) -> float:
    if members != 1 << home:
        return float(problem.stage_LL(home, members)[start, end])
    site = problem.sites[home]
    seconds = float(site.seconds_L[end] - site.seconds_L[start])
    return seconds + (start == 0) * site.first_s + (end == problem.num_layers) * site.last_s


def helpers_of(home: int, members: int) -> tuple[int, ...]:
    """The members of a stage besides its home, ascending."""
    others = members & ~(1 << home)
    return tuple(site for site in range(others.bit_length()) if others >> site & 1)


def sites_of(home: int, members: int) -> tuple[int, ...]:
    """The home of a stage, then its other members."""
    return (home, *helpers_of(home, members))
