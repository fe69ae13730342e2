"""Matrices of the model, made ready to multiply: one function per kernel, chosen by name.

Shapes: T tokens, K inputs, N outputs.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F

from ...cluster.footprint import QUANT_GROUP
from .compiled import NoCompiledKernelsError, Rows, compiled_rows
from .quantise import (
    Int4Matrix,
    Int5Matrix,
    Int8Matrix,
    quantise_int4,
    quantise_int5,
    quantise_int8,
)
from .rows import rows_int4_linear, rows_int5_linear, rows_int8_linear, rows_linear
from .self_test import check_agrees

WeightFormat = Literal["float", "int8", "int5", "int4"]
"""How a matrix is held; ``float`` is the compute dtype."""

logger = logging.getLogger(__name__)

Linear = Callable[[torch.Tensor], torch.Tensor]
"""``x_TK -> y_TN`` in the dtype of x."""
LinearKernel = Callable[[torch.Tensor], Linear]
"""Takes a weight [N, K], which must not change afterwards, and returns the product with it."""


def plain_linear(weight_NK: torch.Tensor) -> Linear:
    """`F.linear` on the weight as it is."""
    return functools.partial(F.linear, weight=weight_NK)


def packed_linear(weight_NK: torch.Tensor) -> Linear:
    """oneDNN on a copy of the weight that is laid out for its kernels; CPU, bf16 or fp32.

    With 1 to 4 tokens it read weights at 20 to 43 GB/s where `F.linear`, which lays every tile
    out anew, reached 12 to 16; with 512 tokens it was 5 to 20 % faster.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def linear(x_TK: torch.Tensor) -> torch.Tensor:
        y_TN: torch.Tensor = multiply(x_TK, packed, None, "none", [], "")
        return y_TN

    return linear


def packed_int4_linear(weight_NK: torch.Tensor) -> Linear:
    """Rounded to 4 bits in groups, in torch's own layout; bf16 on a CPU."""
    if weight_NK.shape[0] % 16:
        return plain_int4_linear(weight_NK)
    matrix = quantise_int4(weight_NK)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.levels().int(), 2)
    scales_and_zeros_GN2 = torch.stack(
        [matrix.group_scales().T, matrix.group_zeros().T], dim=-1
    ).to(torch.bfloat16)
    scales_and_zeros_GN2 = scales_and_zeros_GN2.contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def linear(x_TK: torch.Tensor) -> torch.Tensor:
        y_TN: torch.Tensor = multiply(x_TK, packed, QUANT_GROUP, scales_and_zeros_GN2)
        return y_TN

    return linear


def plain_int8_linear(weight_NK: torch.Tensor) -> Linear:
    """`F.linear` on a copy of the rounded weight that every call makes: small, not fast."""
    return _dequantising(quantise_int8(weight_NK))


def plain_int5_linear(weight_NK: torch.Tensor) -> Linear:
    """As `plain_int8_linear`, in 5 bits, but held in 8 here."""
    return _dequantising(quantise_int5(weight_NK))


def plain_int4_linear(weight_NK: torch.Tensor) -> Linear:
    """As `plain_int8_linear`, in 4 bits."""
    return _dequantising(quantise_int4(weight_NK))


def _dequantising(matrix: Int8Matrix | Int5Matrix | Int4Matrix) -> Linear:
    def linear(x_TK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TK, matrix.dequantise())

    return linear


def paired_rows_linear(weight_NK: torch.Tensor) -> Linear:
    """`rows_linear`, which takes inputs in pairs; `packed_linear` where one is left over."""
    return packed_linear(weight_NK) if weight_NK.shape[1] % 2 else rows_linear(weight_NK)


LINEAR_KERNELS: Mapping[str, LinearKernel] = {
    "plain": plain_linear,
    "packed": packed_linear,
    "rows": paired_rows_linear,
    "plain-int8": plain_int8_linear,
    "rows-int8": rows_int8_linear,
    "plain-int5": plain_int5_linear,
    "rows-int5": rows_int5_linear,
    "plain-int4": plain_int4_linear,
    "packed-int4": packed_int4_linear,
    "rows-int4": rows_int4_linear,
}
_BEST_FIRST: Mapping[tuple[WeightFormat, torch.dtype], tuple[str, ...]] = {
    ("float", torch.float32): ("packed",),
    ("float", torch.bfloat16): ("rows", "packed"),
    ("int8", torch.bfloat16): ("rows-int8",),
    ("int5", torch.bfloat16): ("rows-int5",),
    ("int4", torch.bfloat16): ("rows-int4", "packed-int4"),
}
"""Kernels for a CPU; after them comes the plain one, which works everywhere."""
_PLAIN: Mapping[WeightFormat, str] = {
    "float": "plain",
    "int8": "plain-int8",
    "int5": "plain-int5",
    "int4": "plain-int4",
}


@functools.cache
def default_linear_kernel(
    *, dtype: torch.dtype, device: torch.device, weights: WeightFormat = "float"
) -> str:
    """The name of the fastest kernel that works for the dtype on the device.

    The fast ones stand on a compiler, or on operators that torch does not promise to keep, so each
    must first agree with the plain one on a small matrix; if it does not, a warning says so.
    """
    plain = _PLAIN[weights]
    if device.type != "cpu":
        return plain
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(48, 96, generator=generator).to(dtype)
    x_TK = torch.randn(3, 96, generator=generator).to(dtype)
    rtol = 0.02 if weights != "float" else 1.3e-6 if dtype is torch.float32 else 0.016
    for fast in _BEST_FIRST.get((weights, dtype), ()):
        try:
            # The compiled ones round inputs too, and the plain one its copy of the weights again.
            check_agrees(
                LINEAR_KERNELS[fast](weight_NK)(x_TK),
                LINEAR_KERNELS[plain](weight_NK)(x_TK),
                rtol=rtol,
                atol=1e-5 if weights == "float" else 0.4,
            )
            return fast
        except NoCompiledKernelsError as error:
            logger.info("no compiled kernels: %s", error)
        except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError) as error:
            logger.warning("%s matrices do not work here (%s): decoding takes longer", fast, error)
    if weights != "float":
        logger.warning("no fast kernel for %s here: decoding takes several times as long", weights)
    return plain


@functools.cache
def trusted_rows() -> Rows | None:
    """The compiled functions where they are the default, which has passed its self-test."""
    if default_linear_kernel(dtype=torch.bfloat16, device=torch.device("cpu")) != "rows":
        return None
    return compiled_rows()
