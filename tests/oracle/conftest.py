"""What the long tests of this folder share."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Threads for every core in a test that computes for long; the short ones are best with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)
