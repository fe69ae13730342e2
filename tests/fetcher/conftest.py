"""Shared releases, a store to fetch into, and the weights that the demo is made of here.

One process of each kind shares for all modules.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from magnetar.fetcher.demo import build as demo
from magnetar.fetcher.demo.build import DemoWeights
from magnetar.tests.demo_gguf import write_gguf
from magnetar.tests.fetching import Fetching, Shared, write_files
from magnetar.tests.seeder import seeding


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = write_files(tmp_path_factory.mktemp("shared") / "tiny-release")
    with seeding(folder) as info:
        yield Shared(folder, info)


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = write_files(tmp_path_factory.mktemp("slow") / "tiny-release")
    with seeding(folder, upload_bytes_per_s=1_000_000) as info:
        yield Shared(folder, info)


@pytest.fixture
def fetching(tmp_path: Path) -> Fetching:
    return Fetching(tmp_path / "store")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """The tensors of a tiny GGUF file, which takes the place of the demo's weights."""
    path = tmp_path / "tiny.gguf"
    tensors = write_gguf(path)
    licence = tmp_path / "licence.txt"
    licence.write_text("Apache License")
    weights = DemoWeights(gguf=path, licence=licence, version="1")
    monkeypatch.setattr(demo, "find_weights", lambda: weights)
    return tensors
