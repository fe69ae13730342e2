"""Whole parts of layers in one call: the arithmetic of their parts without what is around it.

With one row the matrices of a layer take a fraction of a millisecond to read, and dozens of small
calls between them took a fifth as long again; one call per part still 6 %. So all neighbouring
parts whose matrices are held as `RowsLinear` are one parallel region (`kernels/`): as a rule all
layers of a stage. Every row comes out the same whatever is beside it in the step.

Shapes: T tokens of the step, C model width.
"""

import ctypes
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .batch import Batch
from .kv_cache import KVCache
from .linear import trusted_rows

_long, _address = ctypes.c_long, ctypes.c_void_p


class FeedForwardPart(ctypes.Structure):
    """As `kernels/layers.h` has it; pointers are addresses of what somebody else holds."""

    _fields_ = (
        ("norm", _address),
        ("gate", _address),
        ("w13", _address),
        ("w2", _address),
        ("counts", _address),
        ("dim", _long),
        ("hidden_dim", _long),
        ("num_experts", _long),
        ("num_chosen", _long),
        ("eps", ctypes.c_float),
    )


class AttentionPart(ctypes.Structure):
    """See `FeedForwardPart`."""

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


class _Part(ctypes.Structure):
    _fields_ = (
        ("attention", _address),
        ("feed_forward", _address),
        ("keys", _address),
        ("values", _address),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("rotations", _address),
        ("positions", _address),
        ("slots", _address),
        ("spans", _address),
        ("block_ids", _address),
        ("num_tokens", _long),
        ("num_spans", _long),
    )


class Part(NamedTuple):
    """``x + attention(norm(x))`` or ``x + feed_forward(norm(x))`` of a layer.

    Attention writes the step's keys and values into the cache. A query meets its keys in stretches
    of 64 from position 0 (or its window) on, in this order and with the same arithmetic whatever
    the step holds beside it, whether the key is of this step or of an earlier one, and wherever its
    block lies.
    """

    about: AttentionPart | FeedForwardPart
    held: tuple[object, ...]
    """What `about` points to."""
    max_threads: int
    """More are not worth it for one token."""


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


class FusedParts:
    """Neighbouring parts of layers as one call. One thread at a time."""

    def __init__(self, parts: Sequence[tuple[int, Part]]) -> None:
        """Each with the id of its layer, in order."""
        rows = trusted_rows()
        assert rows is not None
        self._call = rows.layers
        self._ids = [layer_id for layer_id, _ in parts]
        self._held = tuple(part for _, part in parts)
        self._parts = (_Part * len(parts))(*(_pointer(part) for part in self._held))
        self._max_threads = max(part.max_threads for part in self._held)
        self._caches: Mapping[int, KVCache] = {}

    def forward(
        self, x_TC: torch.Tensor, batch: Batch, caches: Mapping[int, KVCache]
    ) -> torch.Tensor:
        """[T, C]; `caches` are by layer, and keep their memory."""
        self._use(caches)
        pages, num_tokens = batch.pages, len(x_TC)
        step = _Step(
            rotations=batch.turns_L1P.data_ptr(),
            positions=pages.positions.buffer_info()[0],
            slots=pages.slots.buffer_info()[0],
            spans=pages.spans.buffer_info()[0],
            block_ids=pages.block_ids.buffer_info()[0],
            num_tokens=num_tokens,
            num_spans=len(pages.spans) // 4,
        )
        threads = max(1, min(torch.get_num_threads(), self._max_threads * num_tokens))
        x_TC = x_TC.contiguous()
        out_TC = torch.empty_like(x_TC)
        what = ctypes.addressof(self._parts), len(self._parts), ctypes.addressof(step)
        room = _scratch.address(self._call(*what, None, None, None, threads))
        self._call(*what, x_TC.data_ptr(), out_TC.data_ptr(), room, threads)
        return out_TC

    def _use(self, caches: Mapping[int, KVCache]) -> None:
        if caches is self._caches:
            return
        for layer_id, pointer, part in zip(self._ids, self._parts, self._held, strict=True):
            if isinstance(part.about, AttentionPart):
                pointer.keys = caches[layer_id].keys.data_ptr()
                pointer.values = caches[layer_id].values.data_ptr()
        self._caches = caches


def _pointer(part: Part) -> _Part:
    address = ctypes.addressof(part.about)
    if isinstance(part.about, AttentionPart):
        return _Part(attention=address)
    return _Part(feed_forward=address)
