from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from magnetar.errors import CheckpointError, InterruptedByUserError
from magnetar.fetcher.checkpoint.arriving import ArrivingTensorSource
from magnetar.fetcher.checkpoint.checked_files import LoadChecks
from magnetar.fetcher.manifest import Manifest
from magnetar.fetcher.piece_map import ByteRange, ranges_of
from magnetar.fetcher.tensors import TensorEntry, TensorIndex

NAMES = ("layers.0.a", "layers.0.b", "layers.1.a", "layers.2.a")
INDEX = TensorIndex(
    {
        name: TensorEntry(
            name=name, source_name=name, file="w", offset=at * 16, dtype="fp32", shape=(4,)
        )
        for at, name in enumerate(NAMES)
    }
)


class Disk:
    """Files that fill while somebody waits for them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "w"
        self.path.write_bytes(bytes(64))
        self.waits: list[tuple[ByteRange, ...]] = []
        self.is_stopped = False

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        if self.is_stopped:
            raise InterruptedByUserError("stopped")
        self.waits.append(tuple(ranges))
        with self.path.open("r+b") as file:
            for part in ranges:
                numbers = torch.arange(part.offset / 4, part.end / 4, dtype=torch.float32)
                file.seek(part.offset)
                file.write(numbers.numpy().tobytes())

    def mend(self, part: ByteRange) -> None:
        raise AssertionError("nothing is damaged")


def checks(folder: Path) -> LoadChecks:
    return LoadChecks(data=folder, manifest=Manifest())


def steps() -> list[tuple[TensorEntry, ...]]:
    return [INDEX.layer(0), INDEX.layer(1)]


def test_waits_for_each_step_once_and_not_before_it_is_needed(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    source = ArrivingTensorSource(tmp_path, INDEX, steps(), disk, checks=checks(tmp_path))
    assert not disk.waits
    assert torch.equal(source.read("layers.0.b"), torch.arange(4.0, 8.0))
    assert torch.equal(source.read("layers.0.a"), torch.arange(4.0))
    assert disk.waits == [ranges_of(INDEX.layer(0))]
    assert torch.equal(source.read("layers.1.a"), torch.arange(8.0, 12.0))
    assert disk.waits == [ranges_of(INDEX.layer(0)), ranges_of(INDEX.layer(1))]
    assert torch.equal(source.read("layers.0.a"), torch.arange(4.0))


def test_what_is_in_no_step_never_arrived(tmp_path: Path) -> None:
    source = ArrivingTensorSource(tmp_path, INDEX, steps(), Disk(tmp_path), checks=checks(tmp_path))
    with pytest.raises(CheckpointError, match="was not downloaded to this node"):
        source.read("layers.2.a")


def test_the_end_of_waiting_is_the_end_of_reading(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.is_stopped = True
    source = ArrivingTensorSource(tmp_path, INDEX, steps(), disk, checks=checks(tmp_path))
    with pytest.raises(InterruptedByUserError):
        source.read("layers.0.a")
