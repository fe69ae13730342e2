"""Matrices in the blocks that `rows.c` reads: from one row to many at the speed of memory.

Shapes: T tokens, N outputs, K inputs, B blocks of 32 outputs, G groups of inputs, H = K / 2 bytes
of two inputs each.
"""

import torch

from ...cluster.footprint import QUANT_GROUP
from .compiled import BF16, INT4, INT8, multiply_rows
from .quantise import quantise_int4, quantise_int8

_OUTPUTS = 32
_BYTES_PER_THREAD = 128 << 10
"""Less than this is read faster than a second thread wakes up."""


class RowsLinear:
    """The product with a matrix in blocks; every row comes out the same whatever is beside it."""

    __slots__ = ("_address", "_blocks", "_form", "_max_threads", "_multiply", "_shape")

    def __init__(self, form: int, blocks: torch.Tensor, shape: tuple[int, int]) -> None:
        self._multiply = multiply_rows()
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
    """bf16 on a CPU with AVX512-BF16.

    Raises:
        NoCompiledKernelsError: see `multiply_rows`.
        ValueError: K is odd.
    """
    num_outputs, num_inputs = weight_NK.shape
    if num_inputs % 2:
        raise ValueError(f"{num_inputs} inputs are not pairs")
    pairs_BOHP = torch.unflatten(_blocks(weight_NK), 2, (-1, 2))
    return RowsLinear(BF16, _laid_out(pairs_BOHP), (num_outputs, num_inputs))


def rows_int8_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_linear`, rounded to 8 bits; K must be whole groups."""
    matrix = quantise_int8(weight_NK)
    pairs_BOHP = torch.unflatten(_blocks(matrix.q_NK.view(torch.uint8)), 2, (-1, 2))
    groups = _laid_out(pairs_BOHP).view(len(pairs_BOHP), -1, QUANT_GROUP * _OUTPUTS)
    blocks = torch.cat([groups, _by_group(matrix.scales_NG)], dim=2)
    return RowsLinear(INT8, blocks, (weight_NK.shape[0], weight_NK.shape[1]))


def rows_int4_linear(weight_NK: torch.Tensor) -> RowsLinear:
    """As `rows_int8_linear`, in 4 bits."""
    matrix = quantise_int4(weight_NK)
    halves_BOH1 = _blocks(matrix.q_NH).unsqueeze(3)
    groups = _laid_out(halves_BOH1).view(len(halves_BOH1), -1, QUANT_GROUP * _OUTPUTS // 2)
    blocks = torch.cat([groups, _by_group(matrix.scales_NG), _by_group(matrix.zeros_NG)], dim=2)
    return RowsLinear(INT4, blocks, (weight_NK.shape[0], weight_NK.shape[1]))


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """[B, 32, ...], the last block filled up with zeros."""
    missing = -len(matrix) % _OUTPUTS
    if missing:
        matrix = torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])])
    return matrix.reshape(-1, _OUTPUTS, matrix.shape[1])


def _laid_out(pairs_BOHP: torch.Tensor) -> torch.Tensor:
    """A block's outputs side by side for every pair of inputs."""
    return pairs_BOHP.transpose(1, 2).contiguous()


def _by_group(numbers_NG: torch.Tensor) -> torch.Tensor:
    """The bf16 numbers of a block's outputs side by side for every group, as bytes."""
    return _blocks(numbers_NG).transpose(1, 2).contiguous().view(torch.uint8)
