"""Matrices of the model, made ready to multiply: one function per kernel, chosen by name.

Shapes: T tokens, K inputs, N outputs.
"""

import functools
import logging
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

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


LINEAR_KERNELS: Mapping[str, LinearKernel] = {"plain": plain_linear, "packed": packed_linear}


@functools.cache
def default_linear_kernel(*, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the fastest kernel that works for the dtype on the device.

    `packed` stands on operators that torch does not promise to keep, so it must first agree with
    `plain` on a small matrix; if it does not, a warning says so.
    """
    if device.type != "cpu" or dtype is torch.float16:
        return "plain"
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(48, 80, generator=generator).to(dtype)
    x_TK = torch.randn(3, 80, generator=generator).to(dtype)
    try:
        torch.testing.assert_close(packed_linear(weight_NK)(x_TK), plain_linear(weight_NK)(x_TK))
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError) as error:
        logger.warning("packed matrices do not work here (%s): decoding takes twice as long", error)
        return "plain"
    return "packed"
