"""Attention of one layer by itself, over contexts that no cache of the processor holds.

Blocks of keys and values lie anywhere, as where requests have come and gone for a while. Memory
answers such a reader later than one of weights, which lie in long pieces: of two cores of an EPYC
that read weights at 34 GB/s, keys and values came at 21 to 25.
"""

from __future__ import annotations

import math
import random
from functools import partial
from typing import TYPE_CHECKING, Final

from ..cluster.inventory.caches import last_level_cache_bytes
from ..cluster.search.cost import ATTENTION_HEAD_DIM
from ..fetcher.config import ModelConfig
from ..settings import KV_BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

CONTEXT_TOKENS: Final = 2048
"""Of every sequence that is decoded."""
PROMPT_TOKENS: Final = 1024
"""Before the tokens of a prompt that meet them."""
QUERIES: Final = 21
"""Of a prompt, for every two threads."""
KV_BYTES: Final = 128 << 20
"""Keys and values that take turns, at least, and more where caches are large."""
MOST_KV_BYTES: Final = 1 << 30
CUDA_SEQUENCES: Final = 16
CUDA_QUERIES: Final = 512

_CONFIG = ModelConfig(
    dim=32,
    n_layers=1,
    head_dim=ATTENTION_HEAD_DIM,
    hidden_dim=32,
    n_heads=32,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=CONTEXT_TOKENS,
)
"""The heads of Mixtral 8x7B behind projections of next to nothing."""


class SmallAttention:
    """The part of a layer, its cache, and steps to time."""

    def __init__(self, device: str, num_threads: int) -> None:
        import torch

        from .model.kv_cache import KVCache

        self._device, self._dtype = torch.device(device), torch.bfloat16
        is_cpu = self._device.type == "cpu"
        self._num_sequences = num_threads if is_cpu else CUDA_SEQUENCES
        self._num_queries = QUERIES * math.ceil(num_threads / 2) if is_cpu else CUDA_QUERIES
        kv_bytes = 2 * _CONFIG.kv_values_per_token
        self.read_bytes = self._num_sequences * CONTEXT_TOKENS * kv_bytes
        """Keys and values of one decoding step."""
        width = _CONFIG.n_heads * _CONFIG.head_dim
        self.score_flops = 4 * width * self._num_queries * PROMPT_TOKENS
        """Operations that the attention of a chunk has more, deep in a prompt."""
        whole_bytes = min(max(KV_BYTES, 2 * last_level_cache_bytes()), MOST_KV_BYTES)
        self._num_turns = max(2, math.ceil(whole_bytes / self.read_bytes))
        num_tokens = self._num_turns * self._num_sequences * CONTEXT_TOKENS
        num_blocks = max(num_tokens, 2 * (PROMPT_TOKENS + self._num_queries)) // KV_BLOCK_TOKENS
        self._blocks = list(range(num_blocks))
        random.Random(0).shuffle(self._blocks)
        cache = KVCache(_CONFIG, num_blocks=num_blocks, dtype=self._dtype, device=self._device)
        for part in (cache.keys, cache.values):
            part.fill_(0.01)
        self._caches = {0: cache}
        self._run = self._attention()
        self.decoding = self._decoding()
        """Steps of one token of every sequence, each over other keys and values."""
        self.first_chunk, self.deep_chunk = self._chunks()
        """Of a prompt: without tokens before it, and after `PROMPT_TOKENS` of them."""

    def _decoding(self) -> list[Callable[[], object]]:
        per_sequence = CONTEXT_TOKENS // KV_BLOCK_TOKENS
        tables = [
            self._blocks[first : first + per_sequence]
            for first in range(0, len(self._blocks) - per_sequence + 1, per_sequence)
        ]
        each = self._num_sequences
        return [
            self._step(CONTEXT_TOKENS - 1, 1, tables[turn * each : (turn + 1) * each])
            for turn in range(self._num_turns)
        ]

    def _chunks(self) -> tuple[Callable[[], object], Callable[[], object]]:
        num_blocks = -(-(PROMPT_TOKENS + self._num_queries) // KV_BLOCK_TOKENS)
        tables = [self._blocks[:num_blocks]]
        first, deep = (
            self._step(position, self._num_queries, tables) for position in (0, PROMPT_TOKENS)
        )
        return first, deep

    def _step(self, position: int, count: int, tables: list[list[int]]) -> Callable[[], object]:
        import torch

        from .engine.step import StepRow
        from .model.batch import lay_out

        rows = [
            StepRow(request_id=number, position=position, token_ids=(0,) * count)
            for number in range(len(tables))
        ]
        batch = lay_out(
            rows,
            dict(enumerate(tables)),
            config=_CONFIG,
            dtype=self._dtype,
            device=self._device,
        )
        x_TC = torch.ones(count * len(rows), _CONFIG.dim, dtype=self._dtype, device=self._device)
        return partial(self._run, x_TC, batch, self._caches)

    def _attention(self) -> Callable[..., object]:
        import torch

        from .model.attention import Attention
        from .model.fused import FusedParts
        from .model.linear import LINEAR_KERNELS, default_linear_kernel
        from .model.parts import attention_part

        kernel = LINEAR_KERNELS[default_linear_kernel(dtype=self._dtype, device=self._device)]
        width = _CONFIG.n_heads * _CONFIG.head_dim
        all_heads = width + 2 * _CONFIG.n_kv_heads * _CONFIG.head_dim

        def weight(num_outputs: int, num_inputs: int) -> torch.Tensor:
            return torch.full(
                (num_outputs, num_inputs), 0.01, dtype=self._dtype, device=self._device
            )

        attention = Attention(
            _CONFIG,
            wqkv=kernel(weight(all_heads, _CONFIG.dim)),
            wo=kernel(weight(_CONFIG.dim, width)),
        )
        norm_C = torch.ones(_CONFIG.dim, dtype=self._dtype, device=self._device)
        part = attention_part(attention, _CONFIG, norm_C, _CONFIG.norm_eps)
        if part is not None:
            return FusedParts([(0, part)]).forward
        return lambda x_TC, batch, caches: attention.forward(x_TC, batch, caches[0])
