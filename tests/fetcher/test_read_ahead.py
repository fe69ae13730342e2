"""Reading ahead gives the same tensors in any order, within its memory, and the same errors."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.errors import CheckpointError
from magnetar.fetcher.checkpoint.read_ahead import ReadAhead
from magnetar.fetcher.tensors import TensorEntry, TensorIndex

NAMES = tuple("abcdefgh")
INDEX = TensorIndex(
    {
        name: TensorEntry(
            name=name, source_name=name, file="w", offset=0, dtype="fp32", shape=(at + 1,)
        )
        for at, name in enumerate(NAMES)
    }
)


class Disk:
    """Tensors filled with their number; remembers what was read, and can be held up."""

    index = INDEX

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.arrived = threading.Event()
        self.arrived.set()

    def read(self, name: str) -> torch.Tensor:
        if name != NAMES[0]:
            self.arrived.wait()
        self.reads.append(name)
        if name not in INDEX:
            raise CheckpointError(f"no {name}")
        return torch.full(INDEX[name].shape, float(NAMES.index(name)))


@given(
    order=st.permutations(NAMES),
    asked=st.lists(st.sampled_from(NAMES), max_size=12),
    max_ahead_bytes=st.integers(0, 100),
)
@settings(deadline=None)
def test_any_order_gives_what_the_source_gives(
    order: list[str], asked: list[str], max_ahead_bytes: int
) -> None:
    disk = Disk()
    with ReadAhead(disk, [INDEX[n] for n in order], max_ahead_bytes=max_ahead_bytes) as ahead:
        for name in asked:
            assert torch.equal(ahead.read(name), disk.read(name))


def test_each_tensor_is_read_once_and_before_it_is_asked_for() -> None:
    disk = Disk()
    with ReadAhead(disk, INDEX) as ahead:
        for name in NAMES:
            ahead.read(name)
    assert sorted(disk.reads) == sorted(NAMES)


def test_no_more_is_read_ahead_than_may_be_held() -> None:
    disk = Disk()
    with ReadAhead(disk, INDEX, max_ahead_bytes=4 * (2 + 3)) as ahead:
        assert torch.equal(ahead.read("a"), torch.zeros(1))
    # `a` has gone; `b` and `c` fill the room.
    assert set(disk.reads) <= {"a", "b", "c"}


def test_errors_come_where_the_tensor_is_asked_for() -> None:
    lost = TensorEntry(name="x", source_name="x", file="w", offset=0, dtype="fp32", shape=(1,))
    with ReadAhead(Disk(), [INDEX["a"], lost, INDEX["b"]]) as ahead:
        assert torch.equal(ahead.read("a"), torch.zeros(1))
        with pytest.raises(CheckpointError, match="no x"):
            ahead.read("x")
        assert torch.equal(ahead.read("b"), torch.ones(2))


def test_leaving_does_not_wait_for_what_never_arrives() -> None:
    disk = Disk()
    disk.arrived.clear()
    try:
        with ReadAhead(disk, INDEX) as ahead:
            assert torch.equal(ahead.read("a"), torch.zeros(1))
        assert disk.reads == ["a"]
    finally:
        disk.arrived.set()
