"""A disk that runs full under a download, in a small file system of its own. Needs root."""

import contextlib
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent import disk_room
from magnetar.tests.fetching import WEIGHTS, WEIGHTS_BYTES, write_files
from magnetar.tests.seeder import seeding

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that ran full is tried again soon."""
    monkeypatch.setattr(disk_room, "RETRY_S", 0.5)


@contextlib.contextmanager
def small_disk(folder: Path, *, num_bytes: int) -> Iterator[None]:
    folder.mkdir()
    size = f"size={num_bytes}"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)])
    if made.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("num_bytes", [200_000, WEIGHTS_BYTES // 2, WEIGHTS_BYTES])
def test_a_download_waits_for_room_and_loses_nothing(tmp_path: Path, num_bytes: int) -> None:
    folder, store = write_files(tmp_path / "shared" / "tiny-release"), tmp_path / "store"
    told: list[Progress] = []
    make_room = ["mount", "-o", f"remount,size={8 * WEIGHTS_BYTES}", str(store)]

    def on_progress(progress: Progress) -> None:
        told.append(progress)
        if progress.message.startswith("paused: "):
            subprocess.run(make_room, check=True)

    with small_disk(store, num_bytes=num_bytes), seeding(folder) as info:
        with Fetch(
            kind="magnet",
            location=info.magnet,
            store=store,
            timeout_s=30,
            on_progress=on_progress,
            stop=threading.Event(),
        ) as fetch:
            found = fetch.download()
            fetch.verify()
        assert (found / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    paused = [progress for progress in told if progress.message.startswith("paused")]
    assert paused
    # All may have arrived before a write failed, but what lay on the disk came once.
    total = sum(file.stat().st_size for file in folder.iterdir())
    assert fetch.received_bytes <= 2 * total - num_bytes // 2


def test_the_only_peer_is_not_banned_for_what_the_disk_did_not_take(tmp_path: Path) -> None:
    folder, store = write_files(tmp_path / "shared" / "tiny-release"), tmp_path / "store"
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes(30_000_000))
    ballast = store / "ballast"

    def on_progress(progress: Progress) -> None:
        if progress.done_bytes > 5_000_000 and not was_full.is_set():
            was_full.set()
            fill(ballast)
        elif progress.is_paused:
            ballast.unlink(missing_ok=True)

    was_full = threading.Event()
    with (
        small_disk(store, num_bytes=60_000_000),
        seeding(folder, upload_bytes_per_s=8_000_000) as info,
        Fetch(
            kind="magnet",
            location=info.magnet,
            store=store,
            timeout_s=15,
            on_progress=on_progress,
            stop=threading.Event(),
        ) as fetch,
    ):
        found = fetch.download()
        assert (found / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert was_full.is_set()
    assert not ballast.exists()


def fill(ballast: Path) -> None:
    """Leaves no room on its disk."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
