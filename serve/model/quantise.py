"""Weights in 8, 5 and 4 bits: how they are rounded, and what they stand for.

Every output has a unit in fp32, and every group of its inputs a scale that is a whole number of
units; in 5 and 4 bits also a zero, in steps of `ZERO_STEP` units. A byte each is enough, for the
groups of one output are of similar size; in bf16 they were half a bit more a weight, and no better.

Shapes: N outputs, K inputs, G groups of `QUANT_GROUP` inputs, I the inputs of a group,
H = K / 2 bytes of two inputs each.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...cluster.footprint import QUANT_GROUP

ZERO_STEP = 4
_ROWS_AT_ONCE = 1024
"""Rows that are rounded together: the fp32 copies of a whole expert would be gigabytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ScaledMatrix:
    """Groups of weights with a scale each, which is counted in a unit of its row."""

    scales_NG: torch.Tensor
    """uint8."""
    units_N: torch.Tensor
    """fp32."""

    def group_scales(self) -> torch.Tensor:
        """[N, G] in fp32: scale times unit."""
        return self.scales_NG * self.units_N.unsqueeze(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Matrix(_ScaledMatrix):
    """``w = q * scale * unit``."""

    q_NK: torch.Tensor
    """int8, -127 to 127."""

    def dequantise(self) -> torch.Tensor:
        """What the matrix stands for, [N, K] in bf16."""
        q_NGI = self.q_NK.view(*self.scales_NG.shape, QUANT_GROUP).to(torch.bfloat16)
        return q_NGI.mul_(self.group_scales().unsqueeze(2)).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _MatrixWithZeros(_ScaledMatrix):
    """``w = (q - middle) * scale * unit + zero * ZERO_STEP * unit``."""

    zeros_NG: torch.Tensor
    """int8."""

    def group_zeros(self) -> torch.Tensor:
        """[N, G] in fp32: what the middle level stands for."""
        return self.zeros_NG * (ZERO_STEP * self.units_N.unsqueeze(1))

    def _dequantised(self, levels_NK: torch.Tensor, middle: int) -> torch.Tensor:
        q_NGI = levels_NK.view(*self.scales_NG.shape, QUANT_GROUP).to(torch.bfloat16).sub_(middle)
        scales_NG1, zeros_NG1 = self.group_scales().unsqueeze(2), self.group_zeros().unsqueeze(2)
        return torch.addcmul(zeros_NG1.bfloat16(), q_NGI, scales_NG1.bfloat16()).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Int5Matrix(_MatrixWithZeros):
    """The middle level is 16."""

    q_NK: torch.Tensor
    """uint8: the numbers 0 to 31. Only the compiled kernels have them in 5 bits."""

    def dequantise(self) -> torch.Tensor:
        """What the matrix stands for, [N, K] in bf16."""
        return self._dequantised(self.q_NK, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Int4Matrix(_MatrixWithZeros):
    """The middle level is 8."""

    q_NH: torch.Tensor
    """uint8: the even input in the low four bits, the odd one after it in the high ones."""

    def levels(self) -> torch.Tensor:
        """The numbers 0 to 15 themselves, [N, K] in uint8."""
        return torch.stack([self.q_NH & 15, self.q_NH >> 4], dim=-1).flatten(1)

    def dequantise(self) -> torch.Tensor:
        """What the matrix stands for, [N, K] in bf16."""
        return self._dequantised(self.levels(), 8)


def quantise_int8(weight_NK: torch.Tensor) -> Int8Matrix:
    """Round to the nearest of 255 levels between plus and minus the largest weight of a group.

    K must be a multiple of `QUANT_GROUP`. With one scale for a whole row the logits of the demo's
    model were at a cosine of 0.998 to those of bf16; with groups they are at 0.999.
    """
    q_NK, scales_NG, units_N = _by_rows(weight_NK, _round_int8)
    return Int8Matrix(q_NK=q_NK, scales_NG=scales_NG, units_N=units_N)


def quantise_int5(weight_NK: torch.Tensor) -> Int5Matrix:
    """As `quantise_int4`, of 32 levels."""
    q_NK, scales_NG, zeros_NG, units_N = _by_rows(
        weight_NK, functools.partial(_round_levels, num_bits=5)
    )
    return Int5Matrix(q_NK=q_NK, scales_NG=scales_NG, zeros_NG=zeros_NG, units_N=units_N)


def quantise_int4(weight_NK: torch.Tensor) -> Int4Matrix:
    """Round to the nearest of 16 levels between the least and the largest weight of a group.

    K must be a multiple of `QUANT_GROUP`.
    """
    q_NH, scales_NG, zeros_NG, units_N = _by_rows(weight_NK, _round_int4)
    return Int4Matrix(q_NH=q_NH, scales_NG=scales_NG, zeros_NG=zeros_NG, units_N=units_N)


def _by_rows(
    weight_NK: torch.Tensor, rounding: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
) -> list[torch.Tensor]:
    parts = [rounding(rows.float()) for rows in torch.split(weight_NK, _ROWS_AT_ONCE)]
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def _round_int8(w_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    w_NGI = w_NK.view(len(w_NK), -1, QUANT_GROUP)
    exact_NG1 = w_NGI.abs().amax(dim=2, keepdim=True) / 127
    units_N11 = _or_one(exact_NG1.amax(dim=1, keepdim=True) / 255)
    # Scales are rounded first and weights then to their multiples, or a group would be off as one;
    # and they are rounded up, or the largest weight of a group would be cut.
    scales_NG1 = (exact_NG1 / units_N11).ceil_().clamp_(max=255)
    q_NGI = (w_NGI / _or_one(scales_NG1 * units_N11)).round_().clamp_(-127, 127)
    return (
        q_NGI.to(torch.int8).flatten(1),
        scales_NG1.to(torch.uint8).squeeze(2),
        units_N11.flatten(),
    )


def _round_int4(w_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q_NK, *others = _round_levels(w_NK, num_bits=4)
    even_NH, odd_NH = q_NK.view(len(w_NK), -1, 2).unbind(dim=2)
    return (even_NH | odd_NH << 4, *others)


def _round_levels(w_NK: torch.Tensor, *, num_bits: int) -> tuple[torch.Tensor, ...]:
    middle, most = 1 << num_bits - 1, (1 << num_bits) - 1
    w_NGI = w_NK.view(len(w_NK), -1, QUANT_GROUP)
    least_NG1, largest_NG1 = w_NGI.aminmax(dim=2, keepdim=True)
    exact_NG1 = (largest_NG1 - least_NG1) / most
    middles_NG1 = torch.add(least_NG1, exact_NG1, alpha=middle)
    units_N11 = _or_one(
        torch.maximum(
            exact_NG1.amax(dim=1, keepdim=True) / 255,
            middles_NG1.abs().amax(dim=1, keepdim=True) / (127 * ZERO_STEP),
        )
    )
    scales_NG1 = (exact_NG1 / units_N11).round_()
    zeros_NG1 = (middles_NG1 / (ZERO_STEP * units_N11)).round_()
    steps_NGI = w_NGI - zeros_NG1 * (ZERO_STEP * units_N11)
    q_NGI = (steps_NGI / _or_one(scales_NG1 * units_N11)).round_().add_(middle).clamp_(0, most)
    return (
        q_NGI.to(torch.uint8).flatten(1),
        scales_NG1.to(torch.uint8).squeeze(2),
        zeros_NG1.to(torch.int8).squeeze(2),
        units_N11.flatten(),
    )


def _or_one(divisor: torch.Tensor) -> torch.Tensor:
    """1 in place of the zeros of groups or outputs whose weights are all the same."""
    return divisor.masked_fill(divisor == 0, 1.0)
