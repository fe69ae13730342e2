import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from magnetar.errors import CheckpointError
from magnetar.fetcher.checkpoint.safetensors_header import (
    MAX_HEADER_BYTES,
    parse_safetensors_header,
    read_safetensors,
)
from magnetar.tests.readers import MemoryReader

FILE = "model.safetensors"
SMALL = {
    "a.weight": torch.randn(5, 6).to(torch.bfloat16),
    "b.weight": torch.randn(3, 2),
    "c.weight": torch.randn(4).to(torch.float16),
}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def file_of(header: bytes, data: bytes = b"") -> MemoryReader:
    return MemoryReader({FILE: len(header).to_bytes(8, "little") + header + data})


def described(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(begin: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **other}


def test_finds_every_tensor_where_the_reference_implementation_wrote_it() -> None:
    raw = save(SMALL, metadata={"format": "pt"})

    found = read_safetensors(MemoryReader({FILE: raw}), FILE)

    assert {tensor.name for tensor in found} == set(SMALL)
    for tensor in found:
        stored = bytearray(raw[tensor.offset : tensor.offset + tensor.num_bytes])
        numbers = torch.frombuffer(stored, dtype=TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
        assert torch.equal(numbers, SMALL[tensor.name])


def test_reads_nothing_but_the_header() -> None:
    reader = MemoryReader({FILE: save(SMALL)})

    read_safetensors(reader, FILE)

    header_bytes = int.from_bytes(save(SMALL)[:8], "little")
    assert reader.reads == [(FILE, 0, 8), (FILE, 8, header_bytes)]


def test_reads_empty_tensors_and_files_without_tensors() -> None:
    assert read_safetensors(file_of(b"{}"), FILE) == ()
    (empty,) = read_safetensors(file_of(described(t=entry(0, 0))), FILE)
    assert (empty.shape, empty.num_bytes) == ((0,), 0)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (described(a=entry(0, 8), b=entry(4, 12)), bytes(12), "b begins at byte 4 of the data, in"),
        (described(a=entry(0, 8), b=entry(0, 8)), bytes(8), "inside another tensor"),
        (described(a=entry(0, 4), b=entry(8, 12)), bytes(12), "4 bytes before b belong to no"),
        (described(a=entry(4, 8)), bytes(8), "4 bytes before a belong to no tensor"),
        (described(a=entry(0, 4)), bytes(8), "4 bytes at its end belong to no tensor"),
        (described(a=entry(0, 8)), bytes(4), "ends at byte 8 of the data and the file holds 4"),
        (
            described(a=entry(0, 8, shape=[3])),
            bytes(8),
            r"has 8 bytes and its shape \[3\] takes 12",
        ),
        (described(a=entry(8, 0, shape=[0])), b"", "has -8 bytes"),
        (described(a=entry(0, 4, data_offsets=[0])), bytes(4), "no pair of data_offsets"),
        (described(a=entry(0, 4, data_offsets=[0, 4.0])), bytes(4), "no pair of data_offsets"),
        (described(a=entry(0, 4, shape=[True])), bytes(4), "no shape"),
        (described(a=entry(0, 4, shape=[-1])), bytes(4), "no shape"),
        (described(a=entry(0, 4, shape=[1] * 9)), bytes(4), "no shape of at most 8 sizes"),
        (described(a=entry(0, 4, dtype="I32")), bytes(4), "holds a as I32; only BF16, F16, F32"),
        (described(a=entry(0, 4, dtype=["F32"])), bytes(4), "holds a as"),
        (described(a=entry(0, 4, extra=1)), bytes(4), "lacks dtype, shape or data_offsets"),
        (described(a={"dtype": "F32"}), b"", "lacks dtype, shape or data_offsets"),
        (described(a=7), b"", "lacks dtype, shape or data_offsets"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": NaN}', b"", "NaN, which is not JSON"),
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b'{"a":' * 100_000, b"", "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    ],
)
def test_refuses_a_header_that_does_not_cover_the_data_once(
    header: bytes, data: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(file_of(header, data), FILE)


def test_refuses_duplicate_keys() -> None:
    tensor = json.dumps(entry(0, 4))
    offsets_twice = tensor[:-1] + ', "data_offsets": [0, 4]}'

    for header in (f'{{"a": {tensor}, "a": {tensor}}}', f'{{"a": {offsets_twice}}}'):
        with pytest.raises(CheckpointError, match="twice"):
            read_safetensors(file_of(header.encode(), bytes(4)), FILE)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "only 0 bytes"),
        (b"\x02\x00", "only 2 bytes"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), f"at most {MAX_HEADER_BYTES} are read"),
        (b"\xff" * 8, "at most"),
        ((10).to_bytes(8, "little") + b"{}", "its header has 10 bytes and the file 10"),
    ],
)
def test_refuses_a_length_that_cannot_be(raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_safetensors(MemoryReader({FILE: raw}), FILE)


@given(st.integers(1, len(save(SMALL))))
def test_refuses_a_file_cut_off_anywhere(cut: int) -> None:
    with pytest.raises(CheckpointError):
        read_safetensors(MemoryReader({FILE: save(SMALL)[:-cut]}), FILE)


@settings(max_examples=400)
@given(st.data())
def test_never_raises_anything_else_on_mutated_bytes(data: st.DataObject) -> None:
    raw = bytearray(save(SMALL))
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))

    try:
        found = read_safetensors(MemoryReader({FILE: bytes(raw)}), FILE)
    except CheckpointError:
        return
    for tensor in found:
        assert 8 <= tensor.offset <= tensor.offset + tensor.num_bytes <= len(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.text(max_size=5),
        JSON
        | st.fixed_dictionaries(
            {"dtype": st.just("F32") | JSON, "shape": JSON, "data_offsets": JSON}
        ),
        max_size=4,
    ),
    st.integers(0, 64),
)
def test_never_raises_anything_else_on_any_json(header: dict[str, Any], data_bytes: int) -> None:
    raw = json.dumps(header).encode()

    try:
        found = parse_safetensors_header(raw, file=FILE, data_bytes=data_bytes)
    except CheckpointError:
        return
    assert sum(tensor.num_bytes for tensor in found) == data_bytes
