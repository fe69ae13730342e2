import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import CheckpointError
from magnetar.fetcher.checkpoint.source import FileTensorSource, interleave_rotary_rows
from magnetar.fetcher.piece_map import ByteRange
from magnetar.fetcher.tensors import TensorEntry, TensorIndex

ENTRY = TensorEntry(
    name="norm.weight", source_name="n", file="shards/w", offset=3, dtype="fp32", shape=(2, 3)
)


def source(folder: Path, **changes: Any) -> FileTensorSource:
    entry = replace(ENTRY, **changes)
    return FileTensorSource(folder, TensorIndex({entry.name: entry}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    numbers = torch.arange(6, dtype=torch.float32).numpy().tobytes()
    (tmp_path / "shards" / "w").write_bytes(b"abc" + numbers)
    return tmp_path


def test_reads_the_byte_range_into_memory_of_its_own(folder: Path) -> None:
    tensors = source(folder)

    first, second = tensors.read("norm.weight"), tensors.read("norm.weight")

    assert torch.equal(first, torch.arange(6.0).view(2, 3))
    first.zero_()
    assert torch.equal(second, torch.arange(6.0).view(2, 3))
    assert tensors.index["norm.weight"] == ENTRY


def test_reads_every_type_and_empty_tensors(folder: Path) -> None:
    assert source(folder, dtype="bf16", shape=(4,)).read("norm.weight").dtype == torch.bfloat16
    assert source(folder, dtype="fp16", shape=(4,)).read("norm.weight").dtype == torch.float16
    assert source(folder, shape=(0, 3)).read("norm.weight").shape == (0, 3)


def test_reads_on_where_the_disk_gives_less_than_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda descriptor, buffers, at: whole(descriptor, [buffers[0][:5]], at)
    )

    assert torch.equal(source(folder).read("norm.weight"), torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "shards/missing"}, "norm.weight: Cannot open .*missing: No such file"),
        ({"file": "shards"}, "norm.weight: Cannot read .*: Is a directory"),
        ({"offset": 4}, "norm.weight: .* ends at byte 27; verify the release"),
        ({"offset": 400}, "norm.weight: .* ends at byte 400"),
        ({"file": "../shards/w"}, "points outside the release"),
        ({"file": "/etc/passwd"}, "points outside the release"),
    ],
)
def test_says_what_it_cannot_read(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        source(folder, **changes).read("norm.weight")


def test_refuses_unknown_names(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'nope'; it has 1"):
        source(folder).read("nope")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_interleaving_undoes_the_permutation_of_the_converters(
    num_heads: int, pairs: int, columns: int
) -> None:
    released = torch.arange(num_heads * pairs * 2 * columns).view(num_heads * pairs * 2, columns)
    converted = released.view(num_heads, pairs, 2, columns).transpose(1, 2).reshape(-1, columns)

    assert torch.equal(interleave_rotary_rows(converted, num_heads), released)


@pytest.mark.parametrize(
    ("verified", "is_read"),
    [
        ([ByteRange("shards/w", 3, 24)], True),
        ([ByteRange("shards/w", 0, 10), ByteRange("shards/w", 10, 17)], True),
        ([ByteRange("shards/w", 4, 23)], False),
        ([ByteRange("shards/w", 0, 26)], False),
        ([ByteRange("shards/w", 0, 10), ByteRange("shards/w", 11, 16)], False),
        ([ByteRange("other", 0, 99)], False),
        ([], False),
    ],
)
def test_reads_only_what_was_verified(
    folder: Path, verified: list[ByteRange], is_read: bool
) -> None:
    index = TensorIndex({ENTRY.name: ENTRY})
    tensors = FileTensorSource(folder, index, verified=verified)

    if is_read:
        assert torch.equal(tensors.read("norm.weight"), torch.arange(6.0).view(2, 3))
    else:
        with pytest.raises(CheckpointError, match=r"norm\.weight was not downloaded .* --full"):
            tensors.read("norm.weight")
