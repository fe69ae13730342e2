"""What stages take, by where they end and how many layers they have.

Under a limit stages are short, and few devices hold many layers: what is looked through are the
spans that may be, and not all pairs of a first and a last layer.

    K  spans: numbers of layers, the longest first, down to 1      V  ends, 0 to all layers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .problem import Matrix, Problem, Route, evaluate


@dataclass(frozen=True, slots=True)
class Stage:
    """A home and the members that share the experts of its layers, as a bit mask."""

    home: int
    members: int

    @classmethod
    def alone(cls, site: int) -> Stage:
        """All experts at home."""
        return cls(site, 1 << site)


class StageTimes:
    """Seconds of the stages of one problem, each worked out when it is first asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._stage_LL: dict[Stage, Matrix] = {}
        self._band_KV: dict[Stage, Matrix] = {}
        self._every: dict[Stage, Matrix] = {}
        self._stacked: tuple[list[Stage], Matrix] = [], np.empty(0)

    def stage_LL(self, stage: Stage) -> Matrix:
        """[u, v]: of layers [u, v), inf where they do not fit."""
        if stage not in self._stage_LL:
            self._stage_LL[stage] = self.problem.stage_LL(stage.home, stage.members)
        return self._stage_LL[stage]

    def every(self, stage: Stage) -> Matrix:
        """All that a stage can take, ascending; empty: nothing fits."""
        if stage not in self._every:
            matrix = self.stage_LL(stage)
            self._every[stage] = np.unique(matrix[np.isfinite(matrix)])
        return self._every[stage]

    def within(self, stages: Sequence[Stage], limit_s: float) -> Within:
        """Of these, and of hops, what takes no longer than a limit; no transfer of a hop does."""
        problem, chosen = self.problem, list(stages)
        if chosen != self._stacked[0]:
            self._stacked = chosen, _stacked([self._band(stage) for stage in chosen])
        band_SKV = self._stacked[1]
        if limit_s == math.inf:
            return Within(self, chosen, band_SKV, problem.hop_s)
        band_SKV = np.where(band_SKV <= limit_s, band_SKV, np.inf)
        hops = np.where(problem.transfer_s <= limit_s, problem.hop_s, np.inf)
        return Within(self, chosen, _shortened(band_SKV), hops)

    def _band(self, stage: Stage) -> Matrix:
        if stage not in self._band_KV:
            self._band_KV[stage] = _shortened(_band(self.stage_LL(stage)))
        return self._band_KV[stage]

    def route(self, stages: Sequence[Stage], ends: Sequence[int]) -> Route:
        """These stages with these end layers, with all times."""
        seconds = [
            float(self.stage_LL(stage)[start, end])
            for stage, start, end in zip(stages, (0, *ends[:-1]), ends, strict=True)
        ]
        homes, members = [each.home for each in stages], [each.members for each in stages]
        return evaluate(self.problem, homes, ends, members, seconds)


@dataclass(frozen=True, slots=True)
class Within:
    """Stages and hops under a limit."""

    times: StageTimes
    stages: list[Stage]
    band_SKV: Matrix
    """[S, K, V]: of so many layers that end there, inf where that is too long or does not fit."""
    hops: Matrix
    """As `Problem.hop_s`, inf where a step occupies the link for too long."""


def _band(stage_LL: Matrix) -> Matrix:
    """[K, V] of all spans."""
    num_layers = len(stage_LL) - 1
    padded = np.full((2 * num_layers + 1, num_layers + 1), np.inf)
    padded[num_layers:] = stage_LL
    row, column = padded.strides
    # A span of k layers that ends at v begins at v - k.
    return as_strided(padded, (num_layers, num_layers + 1), (row, row + column)).copy()


def _shortened(band_KV: Matrix) -> Matrix:
    """[..., K, V], without spans that are too long everywhere; one stays."""
    fits_K = (np.minimum.reduce(band_KV, axis=-1) < np.inf).reshape(-1, band_KV.shape[-2])
    longest = fits_K.any(axis=0).argmax() if fits_K.any() else -1
    return band_KV[..., longest:, :]


def _stacked(bands: Sequence[Matrix]) -> Matrix:
    longest = max(map(len, bands))
    found = np.full((len(bands), longest, bands[0].shape[1]), np.inf)
    for number, band_KV in enumerate(bands):
        found[number, longest - len(band_KV) :] = band_KV
    return found


class Growth:
    """Adds one stage to partial routes, `count` of them at once, of which the least seconds to
    every number of layers are known."""

    def __init__(self, band_SKV: Matrix, count: int = 1) -> None:
        _, num_spans, num_ends = band_SKV.shape
        self._num_spans = num_spans
        self._padded = np.full((count, num_spans + num_ends), np.inf)
        outer, step = self._padded.strides
        shape = (count, num_spans, num_ends)
        self._windows = as_strided(self._padded, shape, (outer, step, step))
        self._sums = np.empty(shape)

    def __call__(self, before_PV: Matrix, band_PKV: Matrix) -> Matrix:
        """[P, V]: the least seconds with one more stage, from those before it."""
        count = len(before_PV)
        self._padded[:count, self._num_spans :] = before_PV
        sums = np.add(self._windows[:count], band_PKV, out=self._sums[:count])
        found: Matrix = np.minimum.reduce(sums, axis=1)
        return found


def start_of(before_V: Matrix, band_KV: Matrix, end: int) -> int:
    """Where the stage begins that `Growth` finds quickest to one end."""
    first = max(0, end - len(band_KV))
    return first + int((before_V[first:end] + band_KV[first - end :, end]).argmin())
