"""Tensors of a ``.pth`` file, from its zip directory and its pickle alone.

``torch.save`` writes a zip archive of stored members: ``NAME/data.pkl`` first, then one member
``NAME/data/KEY`` for each storage, its bytes aligned to 64. The directory is at the end, so the
first and the last pieces of a torrent are enough to know where everything lies.

The directory has the offset of a member's local header but not of its bytes, because the length of
the local extra field, which holds the padding, is in the local header only. The bytes end where the
next header begins, less a data descriptor of 16 or 24 bytes, which gives the offset back without
reading 995 headers all over the file; the alignment proves the guess. A member for which that does
not come out right (an archive by another writer) has its local header read instead.

Format: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, cast

from ...errors import CheckpointError
from ..tensors import DTYPE_BYTES, RangeReader, StoredDtype
from .pickle_machine import PickledTensor
from .stored_tensor import StoredTensor, some
from .tensor_pickle import MAX_PICKLE_BYTES, read_tensor_pickle

MAX_DIRECTORY_BYTES: Final = 32 << 20
MAX_MEMBERS: Final = 100_000

_ALIGNMENT: Final = 64
_MAX_PADDING_BYTES: Final = 128  # a zip64 field, torch's own field header, and the alignment
_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64: Final = struct.Struct("<4sLQL")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_ENCRYPTED: Final = 0x0001
_HAS_DESCRIPTOR: Final = 0x0008
_METHODS: Final = {8: "DEFLATE", 9: "DEFLATE64", 12: "BZIP2", 14: "LZMA", 93: "ZSTD"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ZipMember:
    """A stored member of the archive."""

    name: str
    header_offset: int
    num_bytes: int
    has_descriptor: bool
    name_bytes: int
    """Length of the name as written."""
    end: int
    """Where the next header, or the directory, begins."""


def read_pth(reader: RangeReader, file: str) -> tuple[StoredTensor, ...]:
    """The tensors of `file`, in the order of its dictionary.

    Raises:
        MissingRangeError: bytes that it needs have not arrived.
        UnsafePickleError: the pickle asks for more than tensors.
        CheckpointError: the file is malformed, or holds what cannot be read as byte ranges.
    """
    members = read_zip_directory(reader, file)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{file} is a zip archive with {len(members)} members and {len(pickles)} of them are "
            "called NAME/data.pkl; it is not a weights file of torch."
        )
    prefix = pickles[0].removesuffix("data.pkl")
    described = members[pickles[0]]
    if described.num_bytes > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{file} has a pickle of {described.num_bytes} bytes and at most {MAX_PICKLE_BYTES} "
            "are read; it is not a plain dictionary of tensors."
        )
    raw = reader.read(file, data_offset(reader, file, described), described.num_bytes)
    pickled = _read_pickle(raw, file)
    _check_byte_order(reader, file, members.get(f"{prefix}byteorder"))

    offsets: dict[str, int] = {}
    tensors = []
    for name, tensor in pickled.items():
        member = members.get(f"{prefix}data/{tensor.storage.key}")
        if member is None:
            raise CheckpointError(
                f"{file} has no member for the numbers of {some([name])}; take the release anew."
            )
        dtype = _check_view(file, name, tensor, member)
        if member.name not in offsets:
            offsets[member.name] = data_offset(reader, file, member)
        tensors.append(
            StoredTensor(
                name=name,
                file=file,
                offset=offsets[member.name] + tensor.offset * DTYPE_BYTES[dtype],
                dtype=dtype,
                shape=tensor.shape,
            )
        )
    _check_overlaps(file, tensors)
    return tuple(tensors)


def _read_pickle(raw: bytes, file: str) -> dict[str, PickledTensor]:
    try:
        return read_tensor_pickle(raw)
    except CheckpointError as cause:
        raise type(cause)(f"{file}: {cause}") from cause


def _check_byte_order(reader: RangeReader, file: str, member: ZipMember | None) -> None:
    """torch >= 2.1 says the byte order; before, it was little-endian wherever anybody trained."""
    if member is None:
        return
    if member.num_bytes > 16:
        raise CheckpointError(f"{file} gives its byte order in {member.num_bytes} bytes.")
    order = reader.read(file, data_offset(reader, file, member), member.num_bytes)
    if order != b"little":
        raise CheckpointError(
            f"{file} has byte order {order!r} and only little-endian numbers are read."
        )


def _check_view(file: str, name: str, tensor: PickledTensor, member: ZipMember) -> StoredDtype:
    """The type of a tensor whose numbers lie side by side inside the member."""
    shown = some([name])
    storage = tensor.storage
    if storage.dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{file} holds {shown} as {storage.dtype}; only {', '.join(DTYPE_BYTES)} are read."
        )
    item_bytes = DTYPE_BYTES[storage.dtype]
    if storage.num_elements * item_bytes != member.num_bytes:
        raise CheckpointError(
            f"{file} has {member.num_bytes} bytes for {shown}, whose storage takes "
            f"{storage.num_elements} numbers of {item_bytes} bytes; take the release anew."
        )
    count = 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if extent > 1 and stride != count:
            raise CheckpointError(
                f"{file} holds {shown} with strides {tensor.strides} for shape {tensor.shape}; "
                "only tensors in row-major order are read."
            )
        count *= extent
    if tensor.offset + count > storage.num_elements:
        raise CheckpointError(
            f"{file} has {storage.num_elements} numbers in the storage of {shown}, which needs "
            f"{tensor.offset + count}; take the release anew."
        )
    return cast(StoredDtype, storage.dtype)


def _check_overlaps(file: str, tensors: list[StoredTensor]) -> None:
    """Tensors may share all their bytes (tied weights) but not a part of them."""
    held = sorted((one for one in tensors if one.num_bytes), key=lambda one: one.offset)
    for before, after in pairwise(held):
        same = (before.offset, before.shape, before.dtype) == (
            after.offset,
            after.shape,
            after.dtype,
        )
        if not same and before.offset + before.num_bytes > after.offset:
            raise CheckpointError(
                f"{file} holds {some([before.name])} and {some([after.name])} in overlapping "
                "bytes; take the release anew."
            )


def read_zip_directory(reader: RangeReader, file: str) -> dict[str, ZipMember]:
    """The members of a zip archive by name, all of them stored, none overlapping.

    Raises:
        MissingRangeError: bytes that it needs have not arrived.
        CheckpointError: it is not such an archive, or is cut off.
    """
    size = reader.files()[file]
    offset, length, count = _find_directory(reader, file, size)
    raw = reader.read(file, offset, length)
    found: list[tuple[str, int, int, int, int]] = []  # name, header, size, flags, name bytes
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > length:
            raise _malformed(file, "its directory is shorter than it says")
        fields = _CENTRAL.unpack_from(raw, at)
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        start = at + _CENTRAL.size
        at = start + name_bytes + extra_bytes + comment_bytes
        if fields[0] != b"PK\x01\x02" or at > length:
            raise _malformed(file, "its directory is damaged")
        name = _decoded(file, raw[start : start + name_bytes])
        extra = raw[start + name_bytes : start + name_bytes + extra_bytes]
        found.append((name, *_member_fields(file, name, fields, extra), name_bytes))
    if at != length:
        raise _malformed(file, "its directory is longer than it says")

    found.sort(key=lambda member: member[1])
    members: dict[str, ZipMember] = {}
    ends = [header for _, header, _, _, _ in found[1:]] + [offset]
    for (name, header, num_bytes, flags, name_bytes), end in zip(found, ends, strict=True):
        if name in members:
            raise _malformed(file, f"it has the member {some([name])} twice")
        if header + _LOCAL.size + name_bytes + num_bytes > end:
            raise _malformed(file, f"its member {some([name])} overlaps what follows")
        members[name] = ZipMember(
            name=name,
            header_offset=header,
            num_bytes=num_bytes,
            has_descriptor=bool(flags & _HAS_DESCRIPTOR),
            name_bytes=name_bytes,
            end=end,
        )
    return members


def data_offset(reader: RangeReader, file: str, member: ZipMember) -> int:
    """Where the member's bytes begin.

    Raises:
        MissingRangeError: the local header is needed and has not arrived.
        CheckpointError: the local header disagrees with the directory.
    """
    earliest = member.header_offset + _LOCAL.size + member.name_bytes
    for descriptor_bytes in (16, 24) if member.has_descriptor else (0,):
        offset = member.end - descriptor_bytes - member.num_bytes
        if offset % _ALIGNMENT == 0 and 0 <= offset - earliest <= _MAX_PADDING_BYTES:
            return offset
    header = _LOCAL.unpack(reader.read(file, member.header_offset, _LOCAL.size))
    if header[0] != b"PK\x03\x04" or header[3] != 0 or header[9] != member.name_bytes:
        raise _malformed(file, f"the header of its member {some([member.name])} is damaged")
    offset = earliest + int(header[10])
    if offset + member.num_bytes > member.end:
        raise _malformed(file, f"its member {some([member.name])} overlaps what follows")
    return offset


def _find_directory(reader: RangeReader, file: str, size: int) -> tuple[int, int, int]:
    """Offset and length of the directory, and how many members it has.

    The end record must be the last 22 bytes: torch writes no archive comment, and a file that is
    cut off does not end with one.
    """
    if size < _END.size:
        raise _malformed(file, f"it has only {size} bytes")
    tail_bytes = min(size, _END64.size + _LOCATOR64.size + _END.size)
    tail = reader.read(file, size - tail_bytes, tail_bytes)
    end = _END.unpack_from(tail, tail_bytes - _END.size)
    signature, disk, first_disk, count_here, count, length, offset, comment_bytes = end
    if signature != b"PK\x05\x06" or comment_bytes != 0:
        raise CheckpointError(
            f"{file} does not end as a zip archive does: it is cut off at {size} bytes, or is not "
            "a weights file of torch >= 1.6. Take the release anew."
        )
    directory_end = size - _END.size
    # torch writes the 64-bit record also where it is not needed.
    wide_bytes = _END64.size + _LOCATOR64.size
    has_wide = tail_bytes == wide_bytes + _END.size and tail[_END64.size :][:4] == b"PK\x06\x07"
    if has_wide:
        directory_end -= wide_bytes
        record = _END64.unpack_from(tail, 0)
        located = _LOCATOR64.unpack_from(tail, _END64.size)
        if (
            record[:2] != (b"PK\x06\x06", _END64.size - 12)
            or located[2] != directory_end
            or not _agree(end[1:7], record[4:10])
        ):
            raise _malformed(file, "its zip64 record is damaged")
        disk, first_disk, count_here, count, length, offset = record[4:10]
    if disk or first_disk or count_here != count:
        raise _malformed(file, "it is spread over several disks")
    if length > MAX_DIRECTORY_BYTES or count > MAX_MEMBERS:
        raise _malformed(file, f"its directory has {count} members in {length} bytes")
    if offset + length != directory_end:
        raise _malformed(file, "its directory is not where its end says")
    return offset, length, count


def _agree(narrow: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    """Whether the numbers of the end record are those of its 64-bit form, or defer to it."""
    deferred = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return all(
        small in (large, mark) for small, large, mark in zip(narrow, wide, deferred, strict=True)
    )


def _member_fields(
    file: str, name: str, fields: tuple[int, ...], extra: bytes
) -> tuple[int, int, int]:
    """Header offset, size and flags of a member, zip64 included."""
    flags, method = fields[3], fields[4]
    stored_bytes, num_bytes, disk, header = fields[8], fields[9], fields[13], fields[16]
    if flags & _ENCRYPTED:
        raise _malformed(file, f"its member {some([name])} is encrypted")
    if method != 0:
        raise CheckpointError(
            f"{file} holds {some([name])} compressed ({_METHODS.get(method, f'method {method}')}); "
            "only stored members are read. Save the weights with torch.save."
        )
    wide = _zip64_values(file, name, extra)
    if num_bytes == 0xFFFFFFFF:
        num_bytes = _next(file, name, wide)
    if stored_bytes == 0xFFFFFFFF:
        stored_bytes = _next(file, name, wide)
    if header == 0xFFFFFFFF:
        header = _next(file, name, wide)
    if disk != 0 or stored_bytes != num_bytes:
        raise _malformed(file, f"its member {some([name])} has two sizes or another disk")
    return header, num_bytes, flags


def _zip64_values(file: str, name: str, extra: bytes) -> list[int]:
    """The 64-bit numbers of the extra field, in their order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if at + length > len(extra):
            break
        if kind == 1:
            return list(struct.unpack_from(f"<{length // 8}Q", extra, at))
        at += length
    return []


def _next(file: str, name: str, wide: list[int]) -> int:
    if not wide:
        raise _malformed(file, f"its member {some([name])} misses its 64-bit size")
    return wide.pop(0)


def _decoded(file: str, name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise _malformed(file, f"a member has the name {name[:40]!r}") from cause


def _malformed(file: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is a damaged zip archive: {reason}. Take the release anew.")
