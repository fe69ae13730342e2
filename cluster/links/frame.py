"""The messages between the members of a pipeline, and their header on the wire.

Both are values, but not frozen: that made one three times as dear, while all stages may be waiting.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import torch

FrameKind = Literal["step", "result", "error", "rows", "outputs", "traffic"]

MAX_BODY_BYTES: Final = 64 << 20
MAX_TENSOR_BYTES: Final = 1 << 30

_MAGIC = b"MGNT"
_VERSION = 2
_HEADER = struct.Struct("<4sBBBBQQIII")
"""Magic, version, kind, dtype, dimensions, epoch, step id, extents (two), bytes of the body."""
HEADER_BYTES: Final = _HEADER.size
# Codes are positions: append only.
_KINDS: Final = ("step", "result", "error", "alive", "rows", "outputs", "traffic")
_DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_DTYPES: Final = tuple(_DTYPE_BYTES)
_NO_TENSOR = 255
_MAX_DIMS = 2


@dataclass(kw_only=True, slots=True, eq=False)
class Frame:
    """One message of the ring, or between a stage and its helper (`rows`, `outputs`)."""

    kind: FrameKind
    epoch: int
    """Incarnation of the pipeline; frames of another one are refused."""
    step_id: int
    body: bytes = b""
    tensor: torch.Tensor | None = None
    """One or two dimensions; on the CPU; bf16, fp16 or fp32."""


@dataclass(kw_only=True, slots=True)
class Header:
    """What the first `HEADER_BYTES` of a frame say about the rest."""

    kind: FrameKind | Literal["alive"]
    """`alive` is a sign of life of the link itself, without a rest."""
    epoch: int
    step_id: int
    dtype: str | None
    """Torch's name of it; None: no tensor follows the body."""
    shape: tuple[int, ...]
    body_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """0 without a tensor."""
        return 0 if self.dtype is None else math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


def pack_header(frame: Frame) -> bytes:
    """The header that announces `frame`; ValueError when it cannot be sent."""
    dtype_code = _NO_TENSOR
    shape: tuple[int, ...] = ()
    if frame.tensor is not None:
        name = str(frame.tensor.dtype).removeprefix("torch.")
        shape = tuple(frame.tensor.shape)
        if name not in _DTYPE_BYTES or not 1 <= len(shape) <= _MAX_DIMS:
            raise ValueError(f"a link carries no tensor of {name} and shape {list(shape)}")
        dtype_code = _DTYPES.index(name)
    _check_sizes(len(frame.body), shape, dtype_code)
    return _HEADER.pack(
        _MAGIC,
        _VERSION,
        _KINDS.index(frame.kind),
        dtype_code,
        len(shape),
        frame.epoch,
        frame.step_id,
        *(*shape, 0, 0)[:_MAX_DIMS],
        len(frame.body),
    )


def pack_alive(epoch: int) -> bytes:
    """A whole frame that only says that the sender lives."""
    return _HEADER.pack(_MAGIC, _VERSION, _KINDS.index("alive"), _NO_TENSOR, 0, epoch, 0, 0, 0, 0)


def parse_header(raw: bytes | bytearray, *, epoch: int) -> Header:
    """The inverse of `pack_header`, strict, before any memory is taken for the rest.

    Raises:
        ValueError: no header of ours, of another epoch, or sizes beyond all sense; the message
            continues a sentence that begins with the peer.
    """
    magic, version, kind, dtype_code, num_dims, sent_epoch, step_id, rows, columns, body_bytes = (
        _HEADER.unpack(raw)
    )
    if magic != _MAGIC or version != _VERSION or kind >= len(_KINDS):
        raise ValueError("sent no frame of this version; run the same Magnetar on all nodes")
    if sent_epoch != epoch:
        raise ValueError(f"sent a frame of epoch {sent_epoch}; this is epoch {epoch}")
    shape: tuple[int, ...] = (rows, columns)[:num_dims]
    has_tensor = dtype_code != _NO_TENSOR
    if (
        num_dims > _MAX_DIMS
        or has_tensor != bool(num_dims)
        or (rows, columns)[num_dims:] != ((0,) * (_MAX_DIMS - num_dims))
    ):
        raise ValueError("sent a frame that contradicts itself")
    if has_tensor and dtype_code >= len(_DTYPES):
        raise ValueError("sent a tensor of unknown dtype")
    _check_sizes(body_bytes, shape, dtype_code)
    return Header(
        kind=_KINDS[kind],
        epoch=sent_epoch,
        step_id=step_id,
        dtype=_DTYPES[dtype_code] if has_tensor else None,
        shape=shape,
        body_bytes=body_bytes,
    )


def _check_sizes(body_bytes: int, shape: tuple[int, ...], dtype_code: int) -> None:
    if body_bytes > MAX_BODY_BYTES:
        raise ValueError(f"announces a body of {body_bytes} bytes; {MAX_BODY_BYTES} are allowed")
    if not shape:
        return
    tensor_bytes = math.prod(shape) * _DTYPE_BYTES[_DTYPES[dtype_code]]
    if tensor_bytes > MAX_TENSOR_BYTES:
        raise ValueError(
            f"announces a tensor of {tensor_bytes} bytes; {MAX_TENSOR_BYTES} are allowed"
        )
