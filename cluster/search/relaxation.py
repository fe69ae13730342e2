"""The placement problem without what makes it hard: a small mixed integer programme.

Layers of a home are a number, not a range; a stage is reached from whoever is nearest, on one link;
who helps whom may be a share. On many sites a helper may help everybody. Every plan is a solution,
with times no longer than the plan's, so that what is best here is a bound on all plans.

    N  sites      C  classes of layers that cost the same everywhere
    G  groups of homes whose experts are counted together: one each, or one for all of them
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .problem import Least, Matrix, Problem

_MOST_CLASSES = 6
"""Of layers; where there are more, those of one owner are taken to be the cheapest of them."""
MOST_PAIRED = 16
"""Sites up to which every home has its own helpers; the programme grows with their square, and for
throughput, of which one is solved for every number of micro-batches, all homes share them."""
FEW_EXPERTS = 64
"""Of all layers, up to which it matters that a site holds whole ones."""
_DIGITS = 9
"""Of costs that are compared, relative to the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerClasses:
    """Layers that cost the same everywhere, and how many there are of each."""

    least: Least
    """With one column a class in place of one a layer."""
    size_C: Matrix
    owner_C: tuple[int, ...]
    """The site that alone may hold them; -1: any but such owners."""


def layer_classes(problem: Problem) -> LayerClasses:
    """The classes of a problem's layers; costs of a class are the least of its layers."""
    least, owner_L = problem.least, _owners(problem)
    matrices = (
        *(least.layer_NL, least.own_NL, least.expert_NL, least.one_expert_NL),
        least.own_bytes_NL,
    )
    rows = [*matrices, least.expert_bytes_L[None, :]]
    keys = np.concatenate([each / max(float(each.max()), 1e-300) for each in rows])
    rounded = np.round(np.concatenate([keys, owner_L[None, :]]), _DIGITS)
    _, class_L = np.unique(rounded, axis=1, return_inverse=True)
    if class_L.max() + 1 > _MOST_CLASSES:
        _, class_L = np.unique(owner_L, return_inverse=True)
    members = [np.flatnonzero(class_L == number) for number in range(class_L.max() + 1)]

    def of(matrix: Matrix) -> Matrix:
        found: Matrix = np.stack([matrix[..., layers].min(axis=-1) for layers in members], axis=-1)
        return found

    return LayerClasses(
        least=Least(
            layer_NL=of(least.layer_NL),
            own_NL=of(least.own_NL),
            expert_NL=of(least.expert_NL),
            one_expert_NL=of(least.one_expert_NL),
            own_bytes_NL=of(least.own_bytes_NL),
            expert_bytes_L=of(least.expert_bytes_L),
            helper_capacity_N=least.helper_capacity_N,
            asked_NN=least.asked_NN,
            rows_NN=least.rows_NN,
            num_experts=least.num_experts,
        ),
        size_C=np.array([float(len(layers)) for layers in members]),
        owner_C=tuple(int(owner_L[layers[0]]) for layers in members),
    )


def _owners(problem: Problem) -> Matrix:
    owner_L = np.full(problem.num_layers, -1)
    for number, site in enumerate(problem.sites):
        if site.span is not None:
            owner_L[site.span[0] : site.span[1]] = number
    return owner_L


@dataclass(frozen=True, kw_only=True, slots=True)
class Programme:
    """minimise ``cost @ x`` for ``lower <= rows @ x <= upper`` and ``0 <= x <= most``."""

    cost: npt.NDArray[np.float64]
    rows: npt.NDArray[np.float64]
    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    most: npt.NDArray[np.float64]
    is_whole: npt.NDArray[np.float64]
    """1 for variables that are whole numbers."""


def programme(
    problem: Problem, *, score: float, throughput: bool, num_stages: int | None = None
) -> Programme:
    """The relaxation, in which plans no better than `score` may be missing.

    What is minimised is, for throughput, `score` over tokens per second; otherwise the round trip
    over the round trip `score`. More than 1 is never of interest.
    """
    return _Builder(problem, score=score, throughput=throughput).built(num_stages)


Term: TypeAlias = "tuple[Any, Any]"
"""Variables and their factors."""


class _Builder:
    """Variables: layers [N, C], experts of a group's layers on each site [G, N, C], whom a group's
    helpers are [G, N], is a home [N], is the first stage, is the last one, links [N, N], seconds of
    a group's experts [G], and the goal. Seconds are told as shares of what the score allows for a
    round trip or a bottleneck."""

    def __init__(self, problem: Problem, *, score: float, throughput: bool) -> None:
        self.problem, self.classes = problem, layer_classes(problem)
        self.least, self.throughput = self.classes.least, throughput
        self.trip_s = problem.streams / score if throughput else score
        self.step_s = problem.step_tokens / score if throughput else math.inf
        count, num_classes = len(problem.sites), len(self.classes.size_C)
        is_paired = self.least.num_experts > 0 and count <= MOST_PAIRED and not throughput
        self.groups = [[home] for home in range(count)] if is_paired else [[*range(count)]]
        shapes = (
            *((count, num_classes), (len(self.groups), count, num_classes)),
            *((len(self.groups), count), (count,), (count,), (count,), (count, count)),
            *((len(self.groups),), (1,)),
        )
        ends = np.cumsum([0, *map(math.prod, shapes)])
        numbered = [
            np.arange(start, start + math.prod(shape)).reshape(shape)
            for start, shape in zip(ends[:-1], shapes, strict=True)
        ]
        self.layers, self.experts, self.helps, self.home, self.first, self.last = numbered[:6]
        self.links, self.shared, self.goal = *numbered[6:8], int(numbered[8][0])
        self.most = np.ones(self.goal + 1)
        self.rows: list[Matrix] = []
        self.limits: list[tuple[float, float]] = []

    def built(self, num_stages: int | None) -> Programme:
        """All of it."""
        self._divide()
        for number in range(len(self.problem.sites)):
            self._hold(number)
            self._order(number)
            if self.throughput:
                self._keep_up(number)
        self._help()
        self._go_round()
        self._add((self.first, 1.0), lower=1, upper=1)
        self._add((self.last, 1.0), lower=1, upper=1)
        if num_stages is not None:
            self._add((self.home, 1.0), lower=num_stages, upper=num_stages)
        cost, is_whole = np.zeros(self.goal + 1), np.zeros(self.goal + 1)
        cost[self.goal] = 1.0
        for whole in (self.layers, self.home, self.first, self.last):
            is_whole[whole] = 1
        is_whole[self.helps] = float(self._is_paired)
        is_whole[self.experts] = float(self._num_experts <= FEW_EXPERTS)
        lower, upper = np.array(self.limits).T
        return Programme(
            cost=cost,
            rows=np.array(self.rows),
            lower=lower,
            upper=upper,
            most=self.most,
            is_whole=is_whole,
        )

    def _add(
        self, *terms: Term, scale: float = 1.0, lower: float = -math.inf, upper: float = math.inf
    ) -> None:
        row = np.zeros(self.goal + 1)
        for at, factor in terms:
            row[at] += np.multiply(factor, scale)
        self.rows.append(row)
        self.limits.append((lower, upper))

    def _divide(self) -> None:
        """Every layer has a home, every expert a host."""
        sites, num_experts = self.problem.sites, self.least.num_experts
        self.most[self.layers] = self.most[self.experts] = 0.0
        for number, owner in enumerate(self.classes.owner_C):
            size = float(self.classes.size_C[number])
            for site in range(len(sites)) if owner < 0 else [owner]:
                if owner >= 0 or sites[site].span is None:
                    self.most[self.layers[site, number]] = size
            self.most[self.experts[:, :, number]] = num_experts * size
            self._add((self.layers[:, number], 1.0), lower=size)
            for homes, experts in zip(self.groups, self.experts[:, :, number], strict=True):
                held = (self.layers[homes, number], -float(num_experts))
                self._add((experts, 1.0), held, lower=0.0)

    def _hold(self, number: int) -> None:
        """A site holds no more than it has memory for, and a home has some layers."""
        site, least = self.problem.sites[number], self.least
        layers, experts, home = self.layers[number], self.experts[:, number], self.home[number]
        longest = _longest(self.problem, least, number, self.step_s)
        self._add((layers, 1.0), (home, -float(longest)), upper=0.0)
        self._add((layers, 1.0), (home, -1.0), lower=0.0)
        if not self.problem.may_help(number):
            for layer, held in zip(layers, experts.T, strict=True):
                self._add((held, 1.0), (layer, -float(least.num_experts)), upper=0.0)
        helping = float(least.helper_capacity_N[number]) if least.num_experts else site.capacity
        helping = max(helping, 0.0)
        scale = 1 / max(site.capacity, helping, 1.0)
        self._add(
            (layers, least.own_bytes_NL[number]),
            (experts, least.expert_bytes_L),
            (self.first[number], site.first_bytes),
            (self.last[number], site.last_bytes),
            (home, helping - site.capacity),
            scale=scale,
            upper=helping * scale,
        )

    def _order(self, number: int) -> None:
        """One link leads to each stage but the first, and one from each but the last."""
        home, first, last = self.home[number], self.first[number], self.last[number]
        for links, end in ((self.links[:, number], first), (self.links[number], last)):
            self._add((links, 1.0), (home, -1.0), (end, 1.0), lower=0, upper=0)
            self._add((end, 1.0), (home, -1.0), upper=0.0)

    def _keep_up(self, number: int) -> None:
        """A stage, all that a site computes, and a link take no longer than a bottleneck."""
        site, least = self.problem.sites[number], self.least
        layers, experts = self.layers[number], self.experts[:, number]
        ends = ((self.first[number], site.first_s), (self.last[number], site.last_s))
        goal, scale = (self.goal, -self.step_s), 1 / self.step_s
        self._add((layers, least.layer_NL[number]), *ends, goal, scale=scale, upper=0.0)
        if least.num_experts:
            busy = (layers, least.own_NL[number]), (experts, least.expert_NL[number])
            self._add(*busy, *ends, goal, scale=scale, upper=0.0)
        carried = (self.links[:, number], self.problem.transfer_s[:, number])
        self._add(carried, goal, scale=scale, upper=0.0)

    @property
    def _is_paired(self) -> bool:
        return len(self.groups) > 1

    @property
    def _num_experts(self) -> float:
        """Of all layers."""
        return self.least.num_experts * float(self.classes.size_C.sum())

    def _help(self) -> None:
        """Nobody helps two homes, nor has a stage meanwhile; only helpers hold a home's experts."""
        count = len(self.problem.sites)
        self.most[self.helps] = float(self._is_paired)
        self.most[self.helps.diagonal()] = 0.0
        if not self._is_paired:
            return
        for site in range(count):
            self._add((self.helps[:, site], 1.0), (self.home[site], 1.0), upper=1.0)
        for home in range(count):
            for site in range(count):
                may = self.home[home] if home == site else self.helps[home, site]
                self._add((self.experts[home, site], 1.0), (may, -self._num_experts), upper=0.0)

    def _go_round(self) -> None:
        """The round trip: own work, experts, the ends of the model, and links.

        The experts of a group take as long as with the best help for each layer; as the mean
        expert on the host that has it; and as every host for those that it holds.
        """
        problem, least, scale = self.problem, self.least, 1 / self.trip_s
        self.most[self.links] = problem.transfer_s <= self.step_s
        self.most[self.links.diagonal()] = 0.0
        self.most[self.shared] = math.inf
        help_s = least.layer_NL - least.own_NL
        for number, homes in enumerate(self.groups):
            shared = (self.shared[number], -self.trip_s)
            self._add((self.layers[homes], help_s[homes]), shared, scale=scale, upper=0.0)
            if not least.num_experts:
                continue
            # A step needs a host at least as often as the share of the experts that it has.
            asked, rows = (
                each[homes].min(axis=0)[:, None] for each in (least.asked_NN, least.rows_NN)
            )
            mean_s = (least.one_expert_NL + asked + rows) / least.num_experts
            each_s = least.expert_NL + asked / least.num_experts + rows
            experts = self.experts[number]
            self._add((experts, mean_s), shared, scale=scale, upper=0.0)
            for held, seconds in zip(experts, each_s, strict=True):
                self._add((held, seconds), shared, scale=scale, upper=0.0)
        back_s = problem.return_s.min(axis=0)
        self._add(
            (self.shared, self.trip_s),
            (self.layers, least.own_NL),
            (self.links, problem.hop_s),
            (self.first, back_s + np.array([site.first_s for site in problem.sites])),
            (self.last, np.array([site.last_s for site in problem.sites])),
            (self.goal, -self.trip_s),
            scale=scale,
            upper=0.0,
        )


def _longest(problem: Problem, least: Least, number: int, limit_s: float) -> int:
    """The most layers that a stage of a home can have by memory and time, were all the cheapest."""
    site, most = problem.sites[number], float(problem.num_layers)
    own_bytes = float(least.own_bytes_NL[number].min())
    if own_bytes > 0:
        most = min(most, max(site.capacity, 0.0) / own_bytes)
    seconds = float(least.layer_NL[number].min())
    if seconds > 0:
        most = min(most, limit_s / seconds)
    return math.floor(most + 1e-9)
