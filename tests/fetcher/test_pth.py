import io
import os
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.errors import CheckpointError, UnsafePickleError
from magnetar.fetcher.checkpoint.canonical import canonical_index, expected_tensors
from magnetar.fetcher.checkpoint.pth import data_offset, read_pth, read_zip_directory
from magnetar.fetcher.checkpoint.release import FolderReader
from magnetar.fetcher.tensors import DTYPE_BYTES, MissingRangeError
from magnetar.tests.published import MIXTRAL_8X7B
from magnetar.tests.readers import ArrivingReader, MemoryReader

FILE = "consolidated.00.pth"
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def saved(value: object) -> bytes:
    archive = io.BytesIO()
    torch.save(value, archive)
    return archive.getvalue()


def reader(raw: bytes) -> MemoryReader:
    return MemoryReader({FILE: raw})


def repacked(raw: bytes, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> bytes:
    """The archive written anew by another writer; `change` puts each member into it."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))
    return rewritten.getvalue()


def keep(archive: zipfile.ZipFile, name: str, raw: bytes) -> None:
    archive.writestr(name, raw)


def assert_reads_back(raw: bytes, expected: dict[str, torch.Tensor]) -> None:
    found = read_pth(reader(raw), FILE)
    assert [tensor.name for tensor in found] == list(expected)
    for tensor in found:
        stored = raw[tensor.offset : tensor.offset + tensor.num_bytes]
        dtype = TORCH_DTYPES[tensor.dtype]
        numbers = torch.frombuffer(bytearray(stored), dtype=dtype).view(tensor.shape)
        assert torch.equal(numbers, expected[tensor.name])


SMALL = {
    "a.weight": torch.randn(5, 7, dtype=torch.float32).to(torch.bfloat16),
    "b.weight": torch.randn(3, 2),
    "c.weight": torch.randn(33).to(torch.float16),
}


def test_finds_every_tensor_where_torch_wrote_it() -> None:
    assert_reads_back(saved(SMALL), SMALL)


def test_finds_views_of_one_storage_and_tied_tensors() -> None:
    whole = torch.randn(6, 4)

    assert_reads_back(
        saved({"top": whole[:2], "middle": whole[2:5], "again": whole[2:5]}),
        {"top": whole[:2], "middle": whole[2:5], "again": whole[2:5]},
    )


def test_reads_an_archive_of_another_writer_by_its_local_headers() -> None:
    assert_reads_back(repacked(saved(SMALL), keep), SMALL)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 9), max_size=3), st.sampled_from(sorted(TORCH_DTYPES))),
        max_size=12,
    )
)
def test_finds_tensors_of_any_shape_and_type(kinds: list[tuple[list[int], str]]) -> None:
    tensors = {
        f"layers.{number}": torch.arange(torch.Size(shape).numel())
        .view(shape)
        .to(TORCH_DTYPES[dtype])
        for number, (shape, dtype) in enumerate(kinds)
    }

    assert_reads_back(saved(tensors), tensors)


def test_reads_the_seed_release_at_full_size_from_its_head_and_tail(tmp_path: Path) -> None:
    """torch's own writer with the numbers left out: 93 GB of holes, beyond what 32 bits count."""
    names = [expected.name for expected in expected_tensors(MIXTRAL_8X7B)]
    with torch.serialization.skip_data():
        torch.save(
            {
                expected.name: torch.empty(expected.shape, dtype=torch.bfloat16)
                for expected in expected_tensors(MIXTRAL_8X7B)
            },
            tmp_path / FILE,
        )
    size = (tmp_path / FILE).stat().st_size
    arriving = ArrivingReader(FolderReader(tmp_path), piece_bytes=4 << 20)

    for _ in range(10):
        try:
            stored = read_pth(arriving, FILE)
            break
        except MissingRangeError as missing:
            arriving.fetch(missing)

    assert arriving.pieces == {(FILE, 0), (FILE, size // (4 << 20))}
    assert sum(tensor.num_bytes for tensor in stored) == 93_405_585_408
    assert [entry.name for entry in canonical_index(stored, MIXTRAL_8X7B)] == names
    complete = FolderReader(tmp_path)
    for member in read_zip_directory(complete, FILE).values():
        local = struct.unpack("<4s5H3L2H", complete.read(FILE, member.header_offset, 30))
        assert data_offset(complete, FILE, member) == member.header_offset + 30 + sum(local[9:])


class Touches:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self._path,)


def test_refuses_a_pickle_with_a_forbidden_global_at_once(tmp_path: Path) -> None:
    raw = saved({**SMALL, "evil": Touches(tmp_path / "touched")})
    began = time.process_time()

    with pytest.raises(UnsafePickleError, match=rf"{FILE}: The pickle refers to posix\.mkdir"):
        read_pth(reader(raw), FILE)

    assert time.process_time() - began < 1.0
    assert not (tmp_path / "touched").exists()


def test_refuses_compressed_members() -> None:
    def deflate(archive: zipfile.ZipFile, name: str, raw: bytes) -> None:
        archive.writestr(name, raw, zipfile.ZIP_DEFLATED if "/data/" in name else None)

    with pytest.raises(CheckpointError, match=r"data/0 compressed \(DEFLATE\)"):
        read_pth(reader(repacked(saved(SMALL), deflate)), FILE)


def test_refuses_the_old_format_and_other_archives() -> None:
    old = io.BytesIO()
    torch.save(SMALL, old, _use_new_zipfile_serialization=False)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")

    with pytest.raises(CheckpointError, match="does not end as a zip archive does"):
        read_pth(reader(old.getvalue()), FILE)
    with pytest.raises(CheckpointError, match="not a weights file of torch"):
        read_pth(reader(other.getvalue()), FILE)
    with pytest.raises(CheckpointError, match="only 0 bytes"):
        read_pth(reader(b""), FILE)


@settings(max_examples=100)
@given(st.integers(1, len(saved(SMALL))))
def test_refuses_a_file_cut_off_anywhere(cut: int) -> None:
    with pytest.raises(CheckpointError):
        read_pth(reader(saved(SMALL)[:-cut]), FILE)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"t": torch.zeros(3, 4).T}, r"t with strides \(1, 4\) for shape \(4, 3\)"),
        ({"t": torch.zeros(3, 4)[:, :2]}, "only tensors in row-major order"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, "holds t as int64"),
        ({"t": torch.zeros(3, dtype=torch.float64)}, "holds t as fp64"),
    ],
)
def test_refuses_tensors_that_are_not_byte_ranges_of_known_numbers(
    tensors: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pth(reader(saved(tensors)), FILE)


def test_refuses_tensors_that_share_a_part_of_their_bytes() -> None:
    whole = torch.zeros(6, 4)

    with pytest.raises(CheckpointError, match="first and second in overlapping bytes"):
        read_pth(reader(saved({"first": whole[:3], "second": whole[2:]})), FILE)
    with pytest.raises(CheckpointError, match="overlapping bytes"):
        read_pth(reader(saved({"first": whole, "other shape": whole.view(4, 6)})), FILE)


def changed(name_part: str, raw: bytes | None) -> Callable[[zipfile.ZipFile, str, bytes], None]:
    def change(archive: zipfile.ZipFile, name: str, old: bytes) -> None:
        if name_part not in name:
            archive.writestr(name, old)
        elif raw is not None:
            archive.writestr(name, raw)

    return change


@pytest.mark.parametrize(
    ("name_part", "raw", "message"),
    [
        ("byteorder", b"big", "byte order b'big'"),
        ("byteorder", b"x" * 99, "its byte order in 99 bytes"),
        ("data/1", None, "no member for the numbers of b.weight"),
        ("data/1", b"short", "has 5 bytes for b.weight, whose storage takes 6 numbers"),
        ("data.pkl", None, "0 of them are called NAME/data.pkl"),
    ],
)
def test_refuses_members_that_disagree(name_part: str, raw: bytes | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pth(reader(repacked(saved(SMALL), changed(name_part, raw))), FILE)


def test_reads_a_file_of_older_torch_that_does_not_say_its_byte_order() -> None:
    assert_reads_back(repacked(saved(SMALL), changed("byteorder", None)), SMALL)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_a_member_that_is_there_twice() -> None:
    def twice(archive: zipfile.ZipFile, name: str, raw: bytes) -> None:
        archive.writestr(name, raw)
        if name.endswith("data/0"):
            archive.writestr(name, raw[::-1])

    with pytest.raises(CheckpointError, match="data/0 twice"):
        read_pth(reader(repacked(saved(SMALL), twice)), FILE)


def patched(raw: bytes, *, signature: bytes, field: int, value: bytes) -> bytes:
    """The archive with some bytes of the last record that has this signature changed."""
    at = raw.rindex(signature) + field
    return raw[:at] + value + raw[at + len(value) :]


@pytest.mark.parametrize(
    ("signature", "field", "value", "message"),
    [
        (b"PK\x01\x02", 8, b"\x01\x00", "is encrypted"),
        (b"PK\x01\x02", 42, b"\x00\x00\x00\x00", "overlaps what follows"),
        (b"PK\x01\x02", 24, b"\xff\xff\xff\x7f", "two sizes"),
        (b"PK\x01\x02", 24, b"\xff\xff\xff\xff", "misses its 64-bit size"),
        (b"PK\x01\x02", 34, b"\x01\x00", "two sizes or another disk"),
        (b"PK\x01\x02", 28, b"\xff\x00", "its directory is damaged"),
        (b"PK\x01\x02", 0, b"PKxx", "its directory is damaged"),
        (b"PK\x01\x02", 46, b"\xff", "has the name"),
        (b"PK\x05\x06", 20, b"\x01\x00", "does not end as a zip archive does"),
        (b"PK\x05\x06", 10, b"\x03\x00", "several disks"),
        (b"PK\x05\x06", 12, b"\x00\x00", "is not where its end says"),
    ],
)
def test_refuses_a_damaged_directory(
    signature: bytes, field: int, value: bytes, message: str
) -> None:
    archive = repacked(saved(SMALL), keep)

    with pytest.raises(CheckpointError, match=message):
        read_pth(reader(patched(archive, signature=signature, field=field, value=value)), FILE)


@pytest.mark.parametrize(
    ("signature", "field", "value"),
    [
        (b"PK\x06\x06", 0, b"PKxx"),
        (b"PK\x06\x06", 32, b"\x01"),
        (b"PK\x06\x07", 8, b"\x01"),
        (b"PK\x05\x06", 10, b"\x01\x00"),
    ],
)
def test_refuses_a_damaged_zip64_record(signature: bytes, field: int, value: bytes) -> None:
    with pytest.raises(CheckpointError, match="zip64 record is damaged"):
        read_pth(reader(patched(saved(SMALL), signature=signature, field=field, value=value)), FILE)


VALID = saved(SMALL)
PLAIN = repacked(VALID, keep)


@settings(max_examples=400)
@given(st.data())
def test_never_raises_anything_else_on_mutated_bytes(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from([VALID, PLAIN])))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))

    try:
        found = read_pth(reader(bytes(raw)), FILE)
    except CheckpointError:
        return
    for tensor in found:
        assert 0 <= tensor.offset <= tensor.offset + tensor.num_bytes <= len(raw)
        assert tensor.dtype in DTYPE_BYTES
