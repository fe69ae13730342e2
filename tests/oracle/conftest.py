"""What the long tests of this folder share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """Threads for every core in tests that compute for long; short ones are best with one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The release that `magnetar demo` serves: 1.4 GB, gone afterwards."""
    from magnetar.fetcher.demo.build import build_demo_release

    folder = tmp_path_factory.mktemp("demo-release")
    yield build_demo_release(folder / "demo")
    shutil.rmtree(folder)
