"""The folder of the demo's release: made once, made anew when damaged, never half made."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from magnetar.errors import (
    DiskSpaceError,
    InterruptedByUserError,
)
from magnetar.fetcher.demo.build import build_demo_release
from magnetar.fetcher.progress import Progress
from magnetar.tests.demo_gguf import (
    facts_of,
)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_finished_folder_is_kept_as_it_is(tmp_path: Path, tiny: object) -> None:
    folder = build_demo_release(tmp_path / "out")
    before = inodes(folder)
    assert build_demo_release(folder) == folder
    assert inodes(folder) == before


@pytest.mark.parametrize(
    "other", [{"num_experts": 4}, {"noise": 0.2}, {"seed": 1}, {"dtype": "fp32"}]
)
def test_folder_of_another_model_is_made_anew(
    tmp_path: Path, tiny: object, other: dict[str, Any]
) -> None:
    folder = build_demo_release(tmp_path / "out")
    before = inodes(folder)
    build_demo_release(folder, **other)
    assert inodes(folder) != before
    build_demo_release(folder)
    assert facts_of(folder).config.num_experts == 8


def _truncate(folder: Path) -> None:
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / ".demo.json").write_text("{"),
        lambda folder: (folder / "surplus.txt").write_text("?"),
    ],
    ids=["truncated-shard", "missing-file", "broken-marker", "surplus-file"],
)
def test_damaged_folder_is_made_anew(
    tmp_path: Path, tiny: object, damage: Callable[[Path], object]
) -> None:
    folder = build_demo_release(tmp_path / "out")
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    build_demo_release(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound


def test_interrupted_build_leaves_nothing(tmp_path: Path, tiny: object) -> None:
    stop = threading.Event()
    with pytest.raises(InterruptedByUserError):
        build_demo_release(tmp_path / "store" / "out", on_progress=lambda _: stop.set(), stop=stop)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".out.lock"]


def test_remains_of_a_killed_build_are_cleared(tmp_path: Path, tiny: object) -> None:
    remains = tmp_path / ".out.building"
    remains.mkdir()
    (remains / "shard-1.part").write_bytes(b"half")
    folder = build_demo_release(tmp_path / "out")
    assert not remains.exists()
    assert not list(folder.glob("*.part"))


def test_second_build_of_a_folder_waits_and_takes_the_first(tmp_path: Path, tiny: object) -> None:
    began, folders = threading.Event(), []
    second = threading.Thread(
        target=lambda: folders.append(build_demo_release(tmp_path / "out")), name="second"
    )

    def on_progress(progress: Progress) -> None:
        if not began.is_set():
            began.set()
            second.start()

    folder = build_demo_release(tmp_path / "out", on_progress=on_progress)
    before = inodes(folder)
    second.join(timeout=30)
    assert folders == [folder]
    assert inodes(folder) == before


def test_full_disk_is_said_before_writing(
    tmp_path: Path, tiny: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"needs 0\.1 GB .* --store"):
        build_demo_release(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_grows_to_the_bytes_of_the_weights(tmp_path: Path, tiny: object) -> None:
    told: list[Progress] = []
    folder = build_demo_release(tmp_path / "out", on_progress=told.append)
    assert told[0].message == "reading tiny.gguf"
    done = [progress.done_bytes for progress in told]
    assert done == sorted(done)
    assert {progress.phase for progress in told} == {"build"}
    assert [progress.finished for progress in told] == [False] * (len(told) - 1) + [True]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert done[-1] == told[1].total_bytes == index["metadata"]["total_size"]


def test_folder_says_what_it_is_and_under_which_licence(tmp_path: Path, tiny: object) -> None:
    folder = build_demo_release(tmp_path / "out", noise=0.25)
    text = (folder / "README.md").read_text()
    for fact in ("tiny.gguf", "8 experts", "0.25", "apache-2.0", "Tests"):
        assert fact in text
    assert (folder / "LICENSE").read_text() == "Apache License"
