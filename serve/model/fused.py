"""Whole parts of a layer in one call: the arithmetic of their parts without what is around it.

With one row the matrices of a layer take some milliseconds to read, and dozens of small calls
between them took a fifth as long again. Attention and feed-forward network are one parallel region
each (`kernels/`), where their matrices are held as `RowsLinear`; all other layers, dtypes and
devices compute part by part. Every row comes out the same whatever is beside it in the step.

Shapes: T tokens of the step, C model width, G KV heads, D head dimension.
"""

import ctypes
import functools
import logging
import threading
from collections.abc import Sequence

import torch

from ...fetcher.config import ModelConfig
from ...settings import KV_BLOCK_TOKENS
from ..engine.step import StepRow
from .attention import Attention
from .batch import Batch, lay_out
from .compiled import MOST_CHOSEN, Matrix
from .feed_forward import FeedForward
from .kv_cache import KVCache
from .linear import trusted_rows
from .moe import LoopExperts, MoeLayer
from .norm import rms_norm
from .rows import RowsLinear, rows_linear
from .traffic import ExpertTraffic

logger = logging.getLogger(__name__)

_OUTPUTS = 32
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
_long, _address = ctypes.c_long, ctypes.c_void_p


class _FeedForwardPart(ctypes.Structure):
    _fields_ = (
        ("norm", _address),
        ("gate", _address),
        ("w13", _address),
        ("w2", _address),
        ("dim", _long),
        ("hidden_dim", _long),
        ("num_experts", _long),
        ("num_chosen", _long),
        ("eps", ctypes.c_float),
    )


class _AttentionPart(ctypes.Structure):
    _fields_ = (
        ("norm", _address),
        ("wqkv", _address),
        ("wo", _address),
        ("dim", _long),
        ("n_heads", _long),
        ("n_kv_heads", _long),
        ("head_dim", _long),
        ("window", _long),
        ("block_tokens", _long),
        ("eps", ctypes.c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rotations", _address),
        ("slots", _address),
        ("spans", _address),
        ("block_ids", _address),
        ("keys", _address),
        ("values", _address),
        ("num_tokens", _long),
        ("num_spans", _long),
    )


class _Scratch(threading.local):
    """Memory of one thread for what lies between the products; grows to the largest step."""

    def __init__(self) -> None:
        self.room = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        """Of at least so many bytes, until the next call."""
        if self.room.nbytes < num_bytes:
            self.room = torch.empty(num_bytes, dtype=torch.uint8)
        return self.room.data_ptr()


_scratch = _Scratch()


class FusedFeedForward:
    """``x + feed_forward(norm(x))``, dense or sparse, with all experts here."""

    def __init__(
        self,
        norm_C: torch.Tensor,
        eps: float,
        *,
        gate: RowsLinear | None,
        num_chosen: int,
        experts: Sequence[tuple[RowsLinear, RowsLinear]],
        traffic: ExpertTraffic | None,
    ) -> None:
        """`experts` have each their `w13` and `w2`; `traffic` hears which are chosen."""
        rows = trusted_rows()
        assert rows is not None
        self._call = rows.feed_forward
        w13 = (Matrix * len(experts))(*(expert[0].matrix for expert in experts))
        w2 = (Matrix * len(experts))(*(expert[1].matrix for expert in experts))
        self._held = (norm_C, gate, experts, w13, w2)
        self._part = _FeedForwardPart(
            norm=norm_C.data_ptr(),
            gate=None if gate is None else ctypes.addressof(gate.matrix),
            w13=ctypes.addressof(w13),
            w2=ctypes.addressof(w2),
            dim=w2[0].n,
            hidden_dim=w2[0].k,
            num_experts=len(experts),
            num_chosen=num_chosen,
            eps=eps,
        )
        self._max_threads = experts[0][0].max_threads
        self._traffic = traffic

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C]"""
        x_TC = x_TC.contiguous()
        part, num_tokens = ctypes.addressof(self._part), len(x_TC)
        threads = _threads(self._max_threads, num_tokens)
        out_TC = torch.empty_like(x_TC)
        experts_TK = torch.empty(num_tokens, self._part.num_chosen, dtype=torch.int64)
        room = _scratch.address(self._call(part, None, None, None, num_tokens, None, threads))
        addresses = x_TC.data_ptr(), out_TC.data_ptr(), experts_TK.data_ptr()
        self._call(part, *addresses, num_tokens, room, threads)
        if self._traffic is not None:
            self._traffic.add(experts_TK)
        return out_TC


class FusedAttention:
    """``x + attention(norm(x))``; writes the step's keys and values into the cache.

    A query meets its keys in stretches of 64 from position 0 (or its window) on, in this order
    and with the same arithmetic whatever the step holds beside it, whether the key is of this
    step or of an earlier one, and wherever its block lies.
    """

    def __init__(
        self,
        config: ModelConfig,
        norm_C: torch.Tensor,
        eps: float,
        *,
        wqkv: RowsLinear,
        wo: RowsLinear,
    ) -> None:
        rows = trusted_rows()
        assert rows is not None
        self._call = rows.attention
        self._held = (norm_C, wqkv, wo)
        self._part = _AttentionPart(
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
        self._max_threads = wqkv.max_threads

    def forward(self, x_TC: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """[T, C]"""
        x_TC = x_TC.contiguous()
        pages = batch.pages
        step = _Step(
            rotations=batch.rotations_T1P.data_ptr(),
            slots=batch.slots_T.data_ptr(),
            spans=pages.spans.buffer_info()[0],
            block_ids=pages.block_ids.buffer_info()[0],
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            num_tokens=len(x_TC),
            num_spans=len(pages.spans) // 4,
        )
        part, about = ctypes.addressof(self._part), ctypes.addressof(step)
        threads = _threads(self._max_threads, len(x_TC))
        out_TC = torch.empty_like(x_TC)
        room = _scratch.address(self._call(part, about, None, None, None, threads))
        self._call(part, about, x_TC.data_ptr(), out_TC.data_ptr(), room, threads)
        return out_TC


def fuse_feed_forward(
    feed_forward: FeedForward | MoeLayer, norm_C: torch.Tensor, eps: float
) -> FusedFeedForward | None:
    """The part as one call; None where its weights or sizes are not such."""
    return _feed_forward(feed_forward, norm_C, eps) if _parts_work() else None


def fuse_attention(
    attention: Attention, config: ModelConfig, norm_C: torch.Tensor, eps: float
) -> FusedAttention | None:
    """The part as one call; None where its weights or sizes are not such."""
    return _attention(attention, config, norm_C, eps) if _parts_work() else None


def _feed_forward(
    feed_forward: FeedForward | MoeLayer, norm_C: torch.Tensor, eps: float
) -> FusedFeedForward | None:
    gate, num_chosen, traffic = None, 1, None
    if isinstance(feed_forward, MoeLayer):
        if not isinstance(feed_forward.gate, RowsLinear):
            return None
        if not isinstance(feed_forward.experts, LoopExperts):
            return None
        gate, num_chosen = feed_forward.gate, feed_forward.num_experts_per_tok
        traffic = feed_forward.traffic
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
    w2 = experts[0][1].matrix
    if w2.n % _OUTPUTS or w2.k % _OUTPUTS:
        return None
    return FusedFeedForward(
        norm_C, eps, gate=gate, num_chosen=num_chosen, experts=experts, traffic=traffic
    )


def _attention(
    attention: Attention, config: ModelConfig, norm_C: torch.Tensor, eps: float
) -> FusedAttention | None:
    wqkv, wo = attention.wqkv, attention.wo
    if not (isinstance(wqkv, RowsLinear) and isinstance(wo, RowsLinear)):
        return None
    if config.dim % _OUTPUTS or config.head_dim % _OUTPUTS or config.head_dim > _MOST_HEAD_DIM:
        return None
    return FusedAttention(config, norm_C, eps, wqkv=wqkv, wo=wo)


@functools.cache
def _parts_work() -> bool:
    """Whether both agree with their parts on a small layer; a warning says if they do not."""
    if trusted_rows() is None:
        return False
    generator = torch.Generator().manual_seed(0)

    def matrix(num_outputs: int, num_inputs: int) -> RowsLinear:
        weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
        return rows_linear(weight.bfloat16())

    config, device = _SELF_TEST, torch.device("cpu")
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
    normed_TC = rms_norm(x_TC, norm_C, config.norm_eps)
    fused_feed_forward = _feed_forward(moe, norm_C, config.norm_eps)
    fused_attention = _attention(attention, config, norm_C, config.norm_eps)
    assert fused_feed_forward is not None
    assert fused_attention is not None
    try:
        for ours_TC, theirs_TC in (
            (fused_feed_forward.forward(x_TC), moe.forward(normed_TC)),
            (
                fused_attention.forward(x_TC, batch, cache),
                attention.forward(normed_TC, batch, cache),
            ),
        ):
            torch.testing.assert_close(ours_TC, x_TC + theirs_TC, rtol=0.02, atol=0.05)
    except AssertionError as error:
        logger.warning("layers are computed part by part (%s): decoding takes longer", error)
        return False
    return True


def _threads(most: int, num_tokens: int) -> int:
    return max(1, min(torch.get_num_threads(), most * num_tokens))
