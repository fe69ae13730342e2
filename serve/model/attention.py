"""Grouped-query attention over the paged cache, one call per row of the step.

Shapes: T tokens of the step, Q tokens of one row, L keys that the row sees, C model width,
G KV heads, R query heads per KV head, N = G * R query heads, D head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...fetcher.config import ModelConfig
from .batch import Batch, Span
from .kv_cache import KVCache
from .linear import Linear
from .rope import rotate

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Span], torch.Tensor]
"""One row of the step, q [Q, N, D], against its keys and values [L, G, D]: [Q, N * D]."""


def attend_at_once(
    q_QND: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor, span: Span
) -> torch.Tensor:
    """One row against all its keys in one call: the fastest."""
    num_queries, _, head_dim = q_QND.shape
    k_GLD, v_GLD = k_LGD.transpose(0, 1), v_LGD.transpose(0, 1)
    q_QGRD = q_QND.view(num_queries, len(k_GLD), -1, head_dim)
    if num_queries == 1:
        # The R heads that share a KV head become R queries of it: no mask and no copy of the
        # keys; `enable_gqa` took 8 to 11 times as long in bf16 on a CPU.
        out_1GRD = F.scaled_dot_product_attention(q_QGRD, k_GLD.unsqueeze(0), v_GLD.unsqueeze(0))
        return out_1GRD.reshape(1, -1)
    # A batch of KV heads, R heads each; the keys are expanded with stride 0, not copied, and one
    # mask serves all heads.
    q_GRQD = q_QGRD.permute(1, 2, 0, 3)
    shape_GRLD = (-1, q_GRQD.shape[1], -1, -1)
    out_GRQD = F.scaled_dot_product_attention(
        q_GRQD,
        k_GLD.unsqueeze(1).expand(shape_GRLD),
        v_GLD.unsqueeze(1).expand(shape_GRLD),
        attn_mask=span.mask_QL,
        is_causal=span.is_causal,
    )
    return out_GRQD.permute(2, 0, 1, 3).reshape(num_queries, -1)


class Attention:
    """`wq`, `wk` and `wv` lie one above the other, for one product instead of three.

    Query heads ``g * R .. (g + 1) * R`` share KV head ``g``.
    """

    def __init__(
        self, config: ModelConfig, *, wqkv: Linear, wo: Linear, attend: Attend = attend_at_once
    ) -> None:
        self.wqkv = wqkv
        """C -> (N + G + G) * D"""
        self.wo = wo
        """N * D -> C"""
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.head_dim
        self._attend = attend

    def forward(self, x_TC: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Attention output [T, C]; writes the step's keys and values into the cache."""
        n_heads, n_kv_heads = self.n_heads, self.n_kv_heads
        qkv_THD = self.wqkv(x_TC).view(len(x_TC), -1, self.head_dim)
        # Queries and keys are neighbours, so they turn in one call.
        qk_THD = rotate(qkv_THD.narrow(1, 0, n_heads + n_kv_heads), batch.rotations_T1P)
        q_TND, k_TGD = qk_THD.narrow(1, 0, n_heads), qk_THD.narrow(1, n_heads, n_kv_heads)
        v_TGD = qkv_THD.narrow(1, n_heads + n_kv_heads, n_kv_heads)
        cache.store(k_TGD, v_TGD, batch.slots_T)
        outputs = [
            self._attend(q_TND.narrow(0, span.start, span.num_tokens), *cache.read(span), span)
            for span in batch.spans
        ]
        out_TX = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.wo(out_TX)
