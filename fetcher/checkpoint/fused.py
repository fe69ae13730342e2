"""The experts of the eight-part ``consolidated.0X.pt``, which lie stacked in one matrix per kind.

``layers.N.block_sparse_moe.w1`` is ``[experts * hidden_dim, dim]``: expert after expert. ``w3`` is
like it, and so is ``w2``, though the model multiplies with its transpose: each expert's slice is
``[hidden_dim, dim]`` and must be turned over. Taking it for ``[dim, hidden_dim]``, which has as
many numbers, gives weights that look right and are not.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from ...errors import CheckpointError
from .stored_tensor import StoredTensor, some

_FUSED: Final = re.compile(r"layers\.\d+\.block_sparse_moe\.w[123]")


def is_fused(name: str) -> bool:
    """Whether a tensor of this name holds the experts of a layer."""
    return _FUSED.fullmatch(name) is not None


def slice_name(layer: int, part: str, expert: int) -> str:
    """What `split_experts` calls one expert's part: ``layers.3.block_sparse_moe.w1[5]``."""
    return f"layers.{layer}.block_sparse_moe.{part}[{expert}]"


def split_experts(stored: Iterable[StoredTensor], num_experts: int) -> Iterator[StoredTensor]:
    """The tensors with every stack of experts cut into one matrix for each; others as they are.

    Raises:
        CheckpointError: a stack does not divide evenly among the experts.
    """
    for tensor in stored:
        if not is_fused(tensor.name):
            yield tensor
            continue
        rows = tensor.shape[0] if len(tensor.shape) == 2 else 0
        if not num_experts or not rows or rows % num_experts:
            raise CheckpointError(
                f"{some([tensor.name])} has the shape {tensor.shape}, which is no stack of "
                f"{num_experts} experts: the weights and params.json are not of one release."
            )
        shape = (rows // num_experts, tensor.shape[1])
        each_bytes = tensor.num_bytes // num_experts
        for expert in range(num_experts):
            yield replace(
                tensor,
                name=f"{tensor.name}[{expert}]",
                offset=tensor.offset + expert * each_bytes,
                shape=shape,
            )
