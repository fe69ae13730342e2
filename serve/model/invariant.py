"""Arithmetic that gives a token the same bits whatever stands beside it: the reproducible mode.

A library may sum the products of one row in another order when there are more rows, or when keys
come in other chunks. What is here keeps one order, at a price: small products are padded, and
attention meets its keys in stretches that begin at fixed positions.

Shapes: T tokens, K inputs, N outputs; Q tokens of one row of the step, L keys that it sees,
S keys of one stretch, G KV heads, R query heads per KV head, M = Q * R rows of one KV head,
D head dimension.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch

from ...errors import PreflightError
from .batch import Span
from .linear import LINEAR_KERNELS, Linear, LinearKernel

STRETCH = 256
"""Keys that are met together: those of the positions from a multiple of it to the next."""
_LEAST_ROWS: Mapping[str, int] = {"packed": 4, "packed-int4": 4}
"""From so many rows on, each came out the same for every number of them up to 512, for all shapes
and 1 to 7 threads: with oneDNN only one row alone was different."""
_LEAST_ROWS_OF_PLAIN = 16
"""With the `F.linear` of a CPU in fp32, 1, 2, 3, 5, 6, 7, 9 and 11 rows were."""
_ROWS_OF_A_CARD = 64
"""On a card the shape decides which kernel computes, so that all products have this many rows."""
_TRIED = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100)

Product = Callable[[torch.Tensor], torch.Tensor]
"""Takes rows in the last dimension but one, and gives as many."""


def invariant_kernel(name: str, device: torch.device) -> LinearKernel:
    """The linear kernel of that name with rows that do not depend on each other.

    Raises:
        PreflightError: the library of this machine rounds them differently all the same.
    """
    if name.startswith("rows"):
        return LINEAR_KERNELS[name]  # it sums every row in one order
    _self_test(name, device)
    return functools.partial(_invariant_linear, name, device)


def _invariant_linear(name: str, device: torch.device, weight_NK: torch.Tensor) -> Linear:
    multiply = LINEAR_KERNELS[name](weight_NK)
    return functools.partial(in_fixed_shapes, multiply, least_rows=_least_rows(name, device))


def _least_rows(name: str, device: torch.device) -> int:
    return _LEAST_ROWS.get(name, _LEAST_ROWS_OF_PLAIN) if device.type == "cpu" else 0


def in_fixed_shapes(multiply: Product, x: torch.Tensor, *, least_rows: int) -> torch.Tensor:
    """`multiply` for rows [..., T, K] that are filled up with zeros.

    To `least_rows`, or with 0, as on a card, in parts of always the same number.
    """
    num_rows = x.shape[-2]
    if least_rows:
        if num_rows >= least_rows:
            return multiply(x)
        return multiply(_filled(x, least_rows)).narrow(-2, 0, num_rows)
    parts = [
        multiply(_filled(part, _ROWS_OF_A_CARD)) for part in torch.split(x, _ROWS_OF_A_CARD, dim=-2)
    ]
    return torch.cat(parts, dim=-2).narrow(-2, 0, num_rows)


def _filled(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    missing = num_rows - x.shape[-2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def invariant_silu(x: torch.Tensor) -> torch.Tensor:
    """`F.silu`, which in fp32 rounded differently where a row was shared by two threads."""
    x_32 = x.float()
    return x_32.div(x_32.neg().exp_().add_(1.0)).to(x.dtype)


def attend_in_stretches(
    q_QND: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor, span: Span
) -> torch.Tensor:
    """One row of the step against its keys, [Q, N * D], in fp32 and rounded once.

    A query meets the stretches one after the other, each whole: keys that it must not see weigh
    nothing, and those that are not there are zeros. So what it sums, and in which order, follows
    from its position alone.
    """
    num_queries, num_heads, head_dim = q_QND.shape
    num_kv_heads = k_LGD.shape[1]
    end_position = span.position + num_queries
    first_position = end_position - span.num_keys
    device = q_QND.device
    q_GQRD = q_QND.view(num_queries, num_kv_heads, -1, head_dim).transpose(0, 1).float()
    q_GMD = (q_GQRD / math.sqrt(head_dim)).flatten(1, 2)
    group = num_heads // num_kv_heads
    positions_M1 = torch.arange(span.position, end_position, device=device)
    positions_M1 = positions_M1.repeat_interleave(group).unsqueeze(1)
    largest_GM1 = q_GMD.new_full((*q_GMD.shape[:2], 1), -math.inf)
    total_GM1 = torch.zeros_like(largest_GM1)
    sum_GMD = torch.zeros_like(q_GMD)
    least_rows = _least_rows("plain", device)
    for start in range(first_position // STRETCH * STRETCH, end_position, STRETCH):
        k_GSD, v_GSD = (_stretch(x_LGD, first_position, start) for x_LGD in (k_LGD, v_LGD))
        k_GDS = k_GSD.transpose(1, 2)
        scores_GMS = in_fixed_shapes(
            functools.partial(torch.matmul, other=k_GDS), q_GMD, least_rows=least_rows
        )
        keys_S = torch.arange(start, start + STRETCH, device=device)
        hidden_MS = keys_S > positions_M1
        if span.window is not None:
            hidden_MS |= keys_S <= positions_M1 - span.window
        scores_GMS = scores_GMS.masked_fill(hidden_MS, -math.inf)
        now_GM1 = torch.maximum(largest_GM1, scores_GMS.amax(dim=-1, keepdim=True))
        # A query may not have seen any key yet: then all weigh nothing.
        origin_GM1 = now_GM1.masked_fill(now_GM1 == -math.inf, 0.0)
        weights_GMS = (scores_GMS - origin_GM1).exp_()
        scale_GM1 = (largest_GM1 - origin_GM1).exp_()
        total_GM1 = total_GM1 * scale_GM1 + weights_GMS.sum(dim=-1, keepdim=True)
        part_GMD = in_fixed_shapes(
            functools.partial(torch.matmul, other=v_GSD), weights_GMS, least_rows=least_rows
        )
        sum_GMD = sum_GMD * scale_GM1 + part_GMD
        largest_GM1 = now_GM1
    out_GQRD = (sum_GMD / total_GM1).view(num_kv_heads, num_queries, group, head_dim)
    return out_GQRD.transpose(0, 1).reshape(num_queries, -1).to(q_QND.dtype)


def _stretch(x_LGD: torch.Tensor, first_position: int, start: int) -> torch.Tensor:
    """The keys or values [G, S, D] of the positions from `start` on, in fp32; zeros are missing."""
    first = max(start, first_position)
    end = min(start + STRETCH, first_position + len(x_LGD))
    there = x_LGD.narrow(0, first - first_position, end - first).transpose(0, 1).float()
    missing = (0, 0, first - start, start + STRETCH - end)
    padded = torch.nn.functional.pad(there, missing)
    return torch.clone(padded, memory_format=torch.contiguous_format)


@functools.cache
def _self_test(name: str, device: torch.device) -> None:
    """Whether rows really come out the same here; the library may be another one."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if name in ("plain", "packed") else torch.bfloat16
    weight_NK = torch.randn(96, 1024, generator=generator).to(device, dtype)
    x_TK = torch.randn(max(_TRIED), 1024, generator=generator).to(device, dtype)
    linear = _invariant_linear(name, device, weight_NK)
    together_TN = linear(x_TK)
    for num_rows in _TRIED:
        if not torch.equal(linear(x_TK[:num_rows]), together_TN[:num_rows]):
            raise PreflightError(
                f"reproducible mode does not work here: {num_rows} rows of a {name} product are"
                f" not those of {max(_TRIED)}; serve without --batch-invariant"
            )
