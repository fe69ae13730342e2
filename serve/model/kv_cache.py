"""Keys and values of one layer, in blocks that the engine hands out.

Shapes: T tokens of the step, L keys of one row, G KV heads, D head dimension.
"""

import torch

from ...fetcher.config import ModelConfig
from ...settings import KV_BLOCK_TOKENS
from .batch import Span


class KVCache:
    """Room for ``num_blocks * KV_BLOCK_TOKENS`` tokens of one layer, in the compute dtype.

    The memory is not cleared, so that pages cost nothing until they are written; a row reads only
    what it or an earlier row of its request has written. Layers whose attention is compiled keep
    their keys and values in it in an order of their own (`kernels/cache.h`): `store` and `read` are
    for the others.
    """

    def __init__(
        self, config: ModelConfig, *, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, KV_BLOCK_TOKENS, config.n_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._key_slots = self.keys.flatten(0, 1)
        self._value_slots = self.values.flatten(0, 1)

    def store(
        self, keys_TGD: torch.Tensor, values_TGD: torch.Tensor, slots_T: torch.Tensor
    ) -> None:
        """Write the step's keys and values into their slots."""
        self._key_slots.index_copy_(0, slots_T, keys_TGD)
        self._value_slots.index_copy_(0, slots_T, values_TGD)

    def read(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [L, G, D] of one row: a view where its blocks lie side by side."""
        key_slots, value_slots = self._key_slots, self._value_slots
        if span.block_ids_B is not None:
            # index_select: `keys[block_ids]` took 4 to 10 times as long on a CPU.
            key_slots = self.keys.index_select(0, span.block_ids_B).flatten(0, 1)
            value_slots = self.values.index_select(0, span.block_ids_B).flatten(0, 1)
        return (
            key_slots.narrow(0, span.first_slot, span.num_keys),
            value_slots.narrow(0, span.first_slot, span.num_keys),
        )
