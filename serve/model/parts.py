"""The parts of layers that the compiled functions compute as a whole.

That is where their matrices are held as `RowsLinear`; all other layers, dtypes and devices compute
step by step.
"""

import ctypes
import functools
import logging

import torch

from ...fetcher.config import ModelConfig
from ...settings import KV_BLOCK_TOKENS
from ..engine.step import StepRow
from .attention import Attention
from .batch import lay_out
from .compiled import MOST_CHOSEN, Matrix
from .feed_forward import FeedForward
from .fused import AttentionPart, FeedForwardPart, FusedParts, Part
from .kv_cache import KVCache
from .linear import trusted_rows
from .moe import LoopExperts, MoeLayer
from .norm import rms_norm
from .rows import RowsLinear, rows_linear
from .self_test import check_agrees

logger = logging.getLogger(__name__)

_OUTPUTS, _LANES = 32, 16
_MOST_HEAD_DIM = 1024
_SELF_TEST = ModelConfig(
    dim=64,
    n_layers=1,
    head_dim=32,
    hidden_dim=32,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=64,
    num_experts=4,
    num_experts_per_tok=2,
)


def feed_forward_part(
    feed_forward: FeedForward | MoeLayer, norm_C: torch.Tensor, eps: float
) -> Part | None:
    """With all experts here; None where its weights or sizes are not such."""
    return _feed_forward(feed_forward, norm_C, eps) if _parts_work() else None


def attention_part(
    attention: Attention, config: ModelConfig, norm_C: torch.Tensor, eps: float
) -> Part | None:
    """None where its weights or sizes are not such."""
    return _attention(attention, config, norm_C, eps) if _parts_work() else None


def _feed_forward(
    feed_forward: FeedForward | MoeLayer, norm_C: torch.Tensor, eps: float
) -> Part | None:
    gate, num_chosen, counts_E = None, 1, None
    if isinstance(feed_forward, MoeLayer):
        if not isinstance(feed_forward.gate, RowsLinear):
            return None
        if not isinstance(feed_forward.experts, LoopExperts):
            return None
        gate, num_chosen = feed_forward.gate, feed_forward.num_experts_per_tok
        counts_E = feed_forward.traffic.counts_E
        networks = feed_forward.experts.experts
    else:
        networks = [feed_forward]
    experts = [
        (each.w13, each.w2)
        for each in networks
        if isinstance(each.w13, RowsLinear) and isinstance(each.w2, RowsLinear)
    ]
    if len(experts) < len(networks) or num_chosen > MOST_CHOSEN:
        return None
    first = experts[0][1].matrix
    if first.n % _OUTPUTS or first.k % _OUTPUTS:
        return None
    w13 = (Matrix * len(experts))(*(expert[0].matrix for expert in experts))
    w2 = (Matrix * len(experts))(*(expert[1].matrix for expert in experts))
    about = FeedForwardPart(
        norm=norm_C.data_ptr(),
        gate=None if gate is None else ctypes.addressof(gate.matrix),
        w13=ctypes.addressof(w13),
        w2=ctypes.addressof(w2),
        counts=None if counts_E is None else counts_E.data_ptr(),
        dim=first.n,
        hidden_dim=first.k,
        num_experts=len(experts),
        num_chosen=num_chosen,
        eps=eps,
    )
    held = (norm_C, gate, experts, w13, w2, counts_E)
    return Part(about, held, experts[0][0].max_threads)


def _attention(
    attention: Attention, config: ModelConfig, norm_C: torch.Tensor, eps: float
) -> Part | None:
    wqkv, wo = attention.wqkv, attention.wo
    if not (isinstance(wqkv, RowsLinear) and isinstance(wo, RowsLinear)):
        return None
    if config.dim % _OUTPUTS or config.head_dim % _LANES or config.head_dim > _MOST_HEAD_DIM:
        return None
    if KV_BLOCK_TOKENS % _LANES:
        return None
    about = AttentionPart(
        norm=norm_C.data_ptr(),
        wqkv=ctypes.addressof(wqkv.matrix),
        wo=ctypes.addressof(wo.matrix),
        dim=wo.matrix.n,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        window=config.sliding_window or 0,
        block_tokens=KV_BLOCK_TOKENS,
        eps=eps,
    )
    return Part(about, (norm_C, wqkv, wo), wqkv.max_threads)


@functools.cache
def _parts_work() -> bool:
    """Whether both agree with their steps on a small layer; a warning says if they do not."""
    if trusted_rows() is None:
        return False
    generator = torch.Generator().manual_seed(0)

    def matrix(num_outputs: int, num_inputs: int) -> RowsLinear:
        weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
        return rows_linear(weight.bfloat16())

    config, device, eps = _SELF_TEST, torch.device("cpu"), _SELF_TEST.norm_eps
    dim, hidden_dim, width = config.dim, config.hidden_dim, config.n_heads * config.head_dim
    networks = [
        FeedForward(w13=matrix(2 * hidden_dim, dim), w2=matrix(dim, hidden_dim)) for _ in range(4)
    ]
    moe = MoeLayer(config, gate=matrix(4, dim), experts=LoopExperts(networks))
    attention = Attention(config, wqkv=matrix(2 * width, dim), wo=matrix(dim, width))
    x_TC = torch.randn(2 * KV_BLOCK_TOKENS, dim, generator=generator).bfloat16()
    row = StepRow(request_id=0, position=0, token_ids=(0,) * len(x_TC))
    batch = lay_out([row], {0: [1, 0]}, config=config, dtype=x_TC.dtype, device=device)
    cache = KVCache(config, num_blocks=2, dtype=x_TC.dtype, device=device)
    norm_C = torch.ones(dim, dtype=x_TC.dtype)
    normed_TC = rms_norm(x_TC, norm_C, eps)
    fused = _attention(attention, config, norm_C, eps), _feed_forward(moe, norm_C, eps)
    by_steps_TC = attention.forward(normed_TC, batch, cache), moe.forward(normed_TC)
    try:
        for part, theirs_TC in zip(fused, by_steps_TC, strict=True):
            assert part is not None
            ours_TC = FusedParts([(0, part)]).forward(x_TC, batch, {0: cache})
            check_agrees(ours_TC, x_TC + theirs_TC, rtol=0.02, atol=0.05)
    except ArithmeticError as error:
        logger.warning("layers are computed step by step (%s): decoding takes longer", error)
        return False
    return True
