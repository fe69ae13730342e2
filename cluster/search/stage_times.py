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

    def band_KV(self, stage: Stage, limit_s: float = math.inf) -> Matrix:
        """[K, V]: of so many layers that end there, inf where that is more than a limit or does
        not fit; spans up to the longest that does."""
        if stage not in self._band_KV:
            self._band_KV[stage] = _shortened(_band(self.stage_LL(stage)))
        band_KV = self._band_KV[stage]
        if limit_s == math.inf:
            return band_KV
        return _shortened(np.where(band_KV <= limit_s, band_KV, np.inf))

    def hops(self, limit_s: float) -> Matrix:
        """As `Problem.hop_s`, inf where a step occupies the link for longer than a limit."""
        problem = self.problem
        if limit_s == math.inf:
            return problem.hop_s
        return np.where(problem.transfer_s <= limit_s, problem.hop_s, np.inf)

    def route(self, stages: Sequence[Stage], ends: Sequence[int]) -> Route:
        """These stages with these end layers, with all times."""
        seconds = [
            float(self.stage_LL(stage)[start, end])
            for stage, start, end in zip(stages, (0, *ends[:-1]), ends, strict=True)
        ]
        homes, members = [each.home for each in stages], [each.members for each in stages]
        return evaluate(self.problem, homes, ends, members, seconds)


def _band(stage_LL: Matrix) -> Matrix:
    """[K, V] of all spans."""
    num_layers = len(stage_LL) - 1
    padded = np.full((2 * num_layers + 1, num_layers + 1), np.inf)
    padded[num_layers:] = stage_LL
    row, column = padded.strides
    # A span of k layers that ends at v begins at v - k.
    return as_strided(padded, (num_layers, num_layers + 1), (row, row + column)).copy()


def _shortened(band_KV: Matrix) -> Matrix:
    """Without spans that are too long for every end; one stays."""
    fits_K = np.minimum.reduce(band_KV, axis=1) < np.inf
    return band_KV[fits_K.argmax() if fits_K.any() else -1 :]


def with_stage(before_V: Matrix, band_KV: Matrix) -> Matrix:
    """[..., V]: the least seconds to so many layers by one more stage, from those before it."""
    num_spans, num_ends = band_KV.shape[-2:]
    padded = np.full((*before_V.shape[:-1], num_spans + num_ends), np.inf)
    padded[..., num_spans:] = before_V
    *outer, step = padded.strides
    windows = as_strided(padded, (*padded.shape[:-1], num_spans, num_ends), (*outer, step, step))
    found: Matrix = np.minimum.reduce(windows + band_KV, axis=-2)
    return found


def start_of(before_V: Matrix, band_KV: Matrix, end: int) -> int:
    """Where the stage of `with_stage` begins that is quickest to one end."""
    first = max(0, end - len(band_KV))
    return first + int((before_V[first:end] + band_KV[first - end :, end]).argmin())
