"""Matrices in the blocks that `rows.c` reads: from one row to many at the speed of memory.

Shapes: T tokens, N outputs, K inputs.
"""

import torch

from ...cluster.footprint import QUANT_GROUP
from .compiled import BF16, INT4, INT8, compiled_rows

_OUTPUTS = 32
_BYTES_PER_THREAD = 128 << 10
"""Less than this is read faster than a second thread wakes up."""


class RowsLinear:
    """The product with a matrix in blocks; every row comes out the same whatever is beside it."""

    __slots__ = ("_address", "_blocks", "_form", "_max_threads", "_multiply", "_shape")

    def __init__(self, form: int, blocks: torch.Tensor, shape: tuple[int, int]) -> None:
        self._multiply = compiled_rows().multiply
        self._form = form
        self._blocks = blocks
        self._address = blocks.data_ptr()
        self._shape = shape
        self._max_threads = max(1, blocks.nbytes // _BYTES_PER_THREAD)

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        num_outputs, num_inputs = self._shape
        num_tokens = x_TK.shape[0]
        if x_TK.dtype is not torch.bfloat16 or x_TK.shape[1] != num_inputs:
            raise ValueError(
                f"{list(x_TK.shape)} of {x_TK.dtype} for {num_inputs} inputs of bfloat16"
            )
        x_TK = x_TK.contiguous()
        y_TN = torch.empty(num_tokens, num_outputs, dtype=torch.bfloat16)
        failed = self._multiply(
            self._form,
            self._address,
            x_TK.data_ptr(),
            y_TN.data_ptr(),
            num_tokens,
            num_outputs,
            num_inputs,
            min(torch.get_num_threads(), self._max_threads),
        )
        if failed:
            raise MemoryError(f"no memory to multiply {num_tokens} rows")
        return y_TN


def rows_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """bf16 on a CPU with AVX512-BF16; K must be even.

    Raises:
        NoCompiledKernelsError: see `compiled_rows`.
    """
    return _laid_out(BF16, weight_NK, 2 * weight_NK.shape[1])


def rows_int8_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_linear`, rounded as by `quantise_int8`; K must be whole groups."""
    return _laid_out(INT8, weight_NK, weight_NK.shape[1] // QUANT_GROUP * (QUANT_GROUP + 2))


def rows_int4_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_linear`, rounded as by `quantise_int4`; K must be whole groups."""
    return _laid_out(INT4, weight_NK, weight_NK.shape[1] // QUANT_GROUP * (QUANT_GROUP // 2 + 4))


def _laid_out(form: int, weight_NK: torch.Tensor, bytes_per_output: int) -> RowsLinear:
    if weight_NK.dtype is not torch.bfloat16:
        raise ValueError(f"{weight_NK.dtype} is not bfloat16")
    num_outputs, num_inputs = weight_NK.shape
    weight_NK = weight_NK.contiguous()
    num_blocks = -(-num_outputs // _OUTPUTS)
    blocks = torch.empty(num_blocks, _OUTPUTS * bytes_per_output, dtype=torch.uint8)
    blocks[-1:].zero_()
    compiled_rows().lay_out(
        form,
        weight_NK.data_ptr(),
        blocks.data_ptr(),
        num_outputs,
        num_inputs,
        torch.get_num_threads(),
    )
    return RowsLinear(form, blocks, (num_outputs, num_inputs))
