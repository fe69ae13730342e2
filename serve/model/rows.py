"""Matrices in the blocks that `kernels/` reads: from one row to many at the speed of memory.

Shapes: T tokens, N outputs, K inputs.
"""

import ctypes

import torch

from ...cluster.footprint import QUANT_GROUP
from .compiled import BF16, INT4, INT5, INT8, Matrix, compiled_rows
from .weight_memory import weight_memory

_OUTPUTS = 32
_BYTES_PER_THREAD = 128 << 10
"""Less than this is read faster than a second thread wakes up."""


class RowsLinear:
    """The product with a matrix in blocks; every row comes out the same whatever is beside it."""

    __slots__ = ("_address", "_blocks", "_multiply", "matrix", "max_threads")

    def __init__(self, form: int, blocks: torch.Tensor, shape: tuple[int, int]) -> None:
        self._multiply = compiled_rows().multiply
        self._blocks = blocks
        self.matrix = Matrix(blocks=blocks.data_ptr(), n=shape[0], k=shape[1], form=form)
        """As long as this object lives."""
        self._address = ctypes.addressof(self.matrix)
        self.max_threads = max(1, blocks.nbytes // _BYTES_PER_THREAD)

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor:
        num_tokens, num_inputs = x_TK.shape
        if x_TK.dtype is not torch.bfloat16 or num_inputs != self.matrix.k:
            raise ValueError(
                f"{list(x_TK.shape)} of {x_TK.dtype} for {self.matrix.k} inputs of bfloat16"
            )
        x_TK = x_TK.contiguous()
        y_TN = torch.empty(num_tokens, self.matrix.n, dtype=torch.bfloat16)
        failed = self._multiply(
            self._address,
            x_TK.data_ptr(),
            y_TN.data_ptr(),
            num_tokens,
            min(torch.get_num_threads(), self.max_threads),
        )
        if failed:
            raise MemoryError(f"no memory to multiply {num_tokens} rows")
        return y_TN


def rows_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """bf16 on a CPU with AVX512-BF16 and VNNI; K must be even.

    Raises:
        NoCompiledKernelsError: see `compiled_rows`.
    """
    return _laid_out(BF16, weight_NK, 2 * weight_NK.shape[1])


def rows_int8_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_linear`, rounded as by `quantise_int8`; K must be whole groups.

    The inputs are rounded too, each group of a row to 255 levels.
    """
    return _laid_out(INT8, weight_NK, _rounded_bytes(weight_NK, QUANT_GROUP + 1))


def rows_int4_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_int8_linear`, rounded as by `quantise_int4`."""
    return _laid_out(INT4, weight_NK, _rounded_bytes(weight_NK, QUANT_GROUP // 2 + 2))


def rows_int5_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_int8_linear`, rounded as by `quantise_int5`."""
    return _laid_out(INT5, weight_NK, _rounded_bytes(weight_NK, QUANT_GROUP * 5 // 8 + 2))


def _rounded_bytes(weight_NK: torch.Tensor, group_bytes: int) -> int:
    """Of one output: a float, and then its groups."""
    return 4 + weight_NK.shape[1] // QUANT_GROUP * group_bytes


def _laid_out(form: int, weight_NK: torch.Tensor, bytes_per_output: int) -> RowsLinear:
    if weight_NK.dtype is not torch.bfloat16:
        raise ValueError(f"{weight_NK.dtype} is not bfloat16")
    num_outputs, num_inputs = weight_NK.shape
    weight_NK = weight_NK.contiguous()
    num_blocks = -(-num_outputs // _OUTPUTS)
    blocks = weight_memory(num_blocks * _OUTPUTS * bytes_per_output).view(num_blocks, -1)
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
