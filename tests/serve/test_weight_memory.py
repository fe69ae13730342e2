import gc
import mmap
from pathlib import Path

import pytest

from magnetar.serve.model.weight_memory import weight_memory

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_what_is_taken_is_apart_and_begins_with_a_page() -> None:
    taken = [weight_memory(size) for size in (1, 4096, 5000, 70 << 20, 3)]
    for number, memory in enumerate(taken):
        assert memory.data_ptr() % 4096 == 0
        memory.fill_(number)
    assert [memory.nbytes for memory in taken] == [1, 4096, 5000, 70 << 20, 3]
    assert all(bool((memory == number).all()) for number, memory in enumerate(taken))


def test_a_piece_lives_as_long_as_a_tensor_of_it() -> None:
    memory = weight_memory(100)
    view = memory[10:20]
    view.fill_(7)
    del memory
    for _ in range(3):
        weight_memory(40 << 20)
    gc.collect()
    assert view.tolist() == [7] * 10


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text() or not hasattr(mmap, "MADV_HUGEPAGE"),
    reason="the system has no huge pages to give",
)
def test_small_matrices_ask_for_huge_pages() -> None:
    address = weight_memory(1 << 20).data_ptr()
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (span := line.split()[0]) and not line[0].isupper():
            begin, end = (int(part, 16) for part in span.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags"):
            assert "hg" in line.split()
            return
    raise AssertionError("the address is mapped nowhere")
