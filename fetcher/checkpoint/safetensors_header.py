"""Tensors of a ``.safetensors`` file, from its header alone.

The format: eight bytes of header length, a JSON object of name -> dtype, shape and data_offsets
(counted from the end of the header), then the numbers without holes.
https://huggingface.co/docs/safetensors
"""

import math
from typing import Any, Final

from ...errors import CheckpointError
from ..tensors import DTYPE_BYTES, RangeReader, StoredDtype
from .json_object import parse_json_object
from .stored_tensor import StoredTensor, some

MAX_HEADER_BYTES: Final = 100_000_000
"""What the reference implementation reads at most."""
MAX_DIMENSIONS: Final = 8

_LENGTH_BYTES: Final = 8
_DTYPES: Final[dict[str, StoredDtype]] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def read_safetensors(reader: RangeReader, file: str) -> tuple[StoredTensor, ...]:
    """The tensors of `file`, in the order of their bytes.

    Raises:
        MissingRangeError: the header has not arrived.
        CheckpointError: the file is malformed or cut off, or holds other numbers than bf16, fp16
            and fp32.
    """
    size = reader.files()[file]
    if size < _LENGTH_BYTES:
        raise _malformed(file, f"it has only {size} bytes")
    length = int.from_bytes(reader.read(file, 0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise _malformed(
            file, f"its header has {length} bytes and at most {MAX_HEADER_BYTES} are read"
        )
    if _LENGTH_BYTES + length > size:
        raise _malformed(file, f"its header has {length} bytes and the file {size}")
    raw = reader.read(file, _LENGTH_BYTES, length)
    return parse_safetensors_header(raw, file=file, data_bytes=size - _LENGTH_BYTES - length)


def parse_safetensors_header(raw: bytes, *, file: str, data_bytes: int) -> tuple[StoredTensor, ...]:
    """The tensors that a header describes; `data_bytes` is what follows it in the file.

    Raises:
        CheckpointError: as `read_safetensors`.
    """
    header = parse_json_object(raw, what=f"The header of {file}", error=CheckpointError)
    header.pop("__metadata__", None)  # free text of the writer
    start = _LENGTH_BYTES + len(raw)
    spans = sorted(
        (_span(file, name, entry) for name, entry in header.items()),
        key=lambda span: (span[0], span[1]),
    )
    tensors = []
    end = 0
    for begin, stop, name, dtype, shape in spans:
        if begin < end:
            raise _malformed(
                file, f"{some([name])} begins at byte {begin} of the data, inside another tensor"
            )
        if begin > end:
            raise _malformed(file, f"{begin - end} bytes before {some([name])} belong to no tensor")
        if stop > data_bytes:
            raise _malformed(
                file,
                f"{some([name])} ends at byte {stop} of the data and the file holds {data_bytes} "
                "(it may be cut off)",
            )
        end = stop
        tensors.append(
            StoredTensor(name=name, file=file, offset=start + begin, dtype=dtype, shape=shape)
        )
    if end != data_bytes:
        raise _malformed(file, f"{data_bytes - end} bytes at its end belong to no tensor")
    return tuple(tensors)


def _span(file: str, name: str, entry: Any) -> tuple[int, int, str, StoredDtype, tuple[int, ...]]:
    """Begin and end in the data, name, dtype and shape of one entry."""
    shown = some([name])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(file, f"{shown} lacks dtype, shape or data_offsets, or has more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{file} holds {shown} as {some([str(dtype)])}; only {', '.join(_DTYPES)} are read. "
            "Quantised checkpoints are not supported."
        )
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _malformed(file, f"{shown} has no shape of at most {MAX_DIMENSIONS} sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _malformed(file, f"{shown} has no pair of data_offsets")
    begin, stop = offsets
    num_bytes = math.prod(shape) * DTYPE_BYTES[_DTYPES[dtype]]
    if stop - begin != num_bytes:
        raise _malformed(
            file, f"{shown} has {stop - begin} bytes and its shape {shape} takes {num_bytes}"
        )
    return begin, stop, name, _DTYPES[dtype], tuple(shape)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 1 << 62 for number in numbers
    )


def _malformed(file: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is a damaged safetensors file: {reason}. Take the release anew."
    )
