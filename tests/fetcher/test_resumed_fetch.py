"""What was fetched before a stop, a kill or a restart is neither fetched nor hashed again."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from magnetar.errors import (
    InterruptedByUserError,
)
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.store import Store
from magnetar.tests.fetching import (
    WEIGHTS,
    WEIGHTS_BYTES,
    Fetching,
    Shared,
    assert_same_files,
    complete,
    write_files,
    write_sums,
)
from magnetar.tests.seeder import seeding


def test_a_restart_of_the_machine_costs_nothing_of_what_was_synced(
    shared: Shared, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fetching(shared.info.magnet) as fetch:
        fetch.download()
        fetch.verify()
        for thread in threading.enumerate():
            if thread.name == "store-sync":
                thread.join()
    monkeypatch.setattr("magnetar.fetcher.torrent.holding.boot_id", lambda: "another")
    with fetching(shared.info.magnet, offline=True) as fetch:
        fetch.download()
        fetch.verify()
        assert (fetch.received_bytes, fetch.hashed_bytes) == (0, 0)


def test_a_stopped_download_goes_on_without_fetching_or_hashing_again(
    slow: Shared, fetching: Fetching
) -> None:
    def stop_at_a_third(progress: Progress) -> None:
        if progress.phase == "download" and progress.done_bytes > WEIGHTS_BYTES / 3:
            fetching.stop.set()

    fetching.on_progress = stop_at_a_third
    first = fetching(slow.info.magnet)
    with pytest.raises(InterruptedByUserError, match="what arrived is kept"):
        complete(first)
    assert first.received_bytes < slow.wanted_bytes
    fetching.stop.clear()
    fetching.on_progress = lambda progress: None
    with fetching(slow.info.magnet) as again:
        folder = again.download()
        assert again.hashed_bytes == 0
        # What libtorrent had requested and not yet received when it was stopped comes again.
        slack = 8 * slow.piece_length
        assert first.received_bytes + again.received_bytes < slow.wanted_bytes + slack
        again.verify()
    assert_same_files(folder, slow.folder)


def killed_at(part: float, magnet: str, store: Path) -> None:
    """Fetches in a process that is killed once this part of the weights is there."""
    code = f"""
import pathlib, threading
from magnetar.fetcher.fetch import Fetch
def tell(progress):
    if progress.phase == "download" and progress.done_bytes > {int(WEIGHTS_BYTES * part)}:
        print("now", flush=True)
fetch = Fetch(kind="magnet", location={magnet!r}, on_progress=tell, timeout_s=30,
              store=pathlib.Path({str(store)!r}), stop=threading.Event())
fetch.download()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_downloads_lose_little_and_hash_only_what_came_last(
    slow: Shared, fetching: Fetching
) -> None:
    for part in (0.3, 0.55, 0.8):
        killed_at(part, slow.info.magnet, fetching.store)
    place = Store(fetching.store).release_folder(slow.info.info_hash)
    on_record = place.record.read().pieces
    assert on_record
    with fetching(slow.info.magnet) as fetch:
        folder = fetch.download()
        assert fetch.received_bytes < slow.wanted_bytes * 0.5
        # Counted in whole pieces.
        unknown = slow.wanted_bytes - (len(on_record) - 2) * slow.piece_length
        assert fetch.hashed_bytes <= unknown
        fetch.verify()
    assert_same_files(folder, slow.folder)
    complete(fetching(slow.info.magnet, offline=True))


def test_a_file_that_another_changed_after_a_kill_is_hashed_and_no_other(
    slow: Shared, fetching: Fetching
) -> None:
    killed_at(0.8, slow.info.magnet, fetching.store)
    place = Store(fetching.store).release_folder(slow.info.info_hash)
    on_record = place.record.read().pieces
    assert len(on_record) > 10
    tokenizer = place.data / "tiny-release" / "tokenizer.model"
    data = bytearray(tokenizer.read_bytes())
    data[20_000] ^= 1
    tokenizer.write_bytes(data)
    future_ns = time.time_ns() + 3600 * 10**9
    os.utime(tokenizer, ns=(future_ns, future_ns))
    with fetching(slow.info.magnet) as fetch:
        folder = fetch.download()
        unknown = slow.wanted_bytes - len(on_record) * slow.piece_length
        assert fetch.hashed_bytes <= unknown + 5 * slow.piece_length
        fetch.verify()
    assert_same_files(folder, slow.folder)


@pytest.mark.parametrize("years", [-40, 40], ids=["back", "ahead"])
def test_a_clock_that_jumped_between_two_runs_costs_no_byte(
    slow: Shared, fetching: Fetching, years: int
) -> None:
    killed_at(0.5, slow.info.magnet, fetching.store)
    place = Store(fetching.store).release_folder(slow.info.info_hash)
    on_record = place.record.read().pieces
    # As seen from now on, everything was written at another time.
    moved_ns = years * 365 * 86_400 * 10**9
    for path in place.root.rglob("*"):
        times = path.stat()
        os.utime(path, ns=(times.st_atime_ns + moved_ns, times.st_mtime_ns + moved_ns))
    with fetching(slow.info.magnet) as fetch:
        folder = fetch.download()
        assert fetch.received_bytes <= slow.wanted_bytes - len(on_record) * slow.piece_length
        fetch.verify()
    assert_same_files(folder, slow.folder)
    complete(fetching(slow.info.magnet, offline=True))


def test_another_torrent_under_the_resume_data_of_the_first_costs_neither_of_them_anything(
    shared: Shared, fetching: Fetching, tmp_path: Path
) -> None:
    whole = complete(fetching(shared.info.magnet))
    torrent = tmp_path / "a.torrent"
    torrent.write_bytes(shared.info.torrent)
    complete(fetching(str(torrent), kind="torrent", offline=True))
    # The publisher puts another release under the same names and the same file.
    changed = write_files(tmp_path / "changed" / "tiny-release")
    data = bytearray((changed / WEIGHTS).read_bytes())
    data[:100_000] = bytes(100_000)
    (changed / WEIGHTS).write_bytes(data)
    write_sums(changed, WEIGHTS, "tokenizer.model")
    with seeding(changed) as info:
        torrent.write_bytes(info.torrent)
        new = complete(fetching(str(torrent), kind="torrent", peers=(info.address,)))
    assert new != whole
    assert_same_files(new, changed)
    assert_same_files(whole, shared.folder)
    # Also where it comes to lie in the store of the first, beside its resume data and record.
    place = Store(fetching.store).release_folder(shared.info.info_hash)
    (place.root / "torrent").write_bytes(info.torrent)
    with fetching(shared.info.magnet) as fetch:
        fetch.download()
        fetch.verify()
        assert fetch.received_bytes == 0
    assert_same_files(whole, shared.folder)


def test_a_lost_or_damaged_record_or_resume_costs_no_download(
    shared: Shared, fetching: Fetching
) -> None:
    complete(fetching(shared.info.magnet))
    place = Store(fetching.store).release_folder(shared.info.info_hash)
    for name, keep in (("record.json", 0.5), ("resume", 0.5), ("record.json", 0), ("resume", 0)):
        raw = (place.root / name).read_bytes()
        (place.root / name).write_bytes(raw[: int(len(raw) * keep)])
        with fetching(shared.info.magnet, timeout_s=10) as fetch:
            fetch.download()
            fetch.verify()
            assert fetch.received_bytes == 0


def test_pieces_whose_rest_was_deleted_are_fetched_again(
    shared: Shared, fetching: Fetching
) -> None:
    folder = complete(fetching(shared.info.magnet))
    place = Store(fetching.store).release_folder(shared.info.info_hash)
    (parts,) = place.data.glob(".*.parts")
    parts.unlink()
    for path in folder.iterdir():
        os.utime(path)
    with fetching(shared.info.magnet) as fetch:
        fetch.verify()
        assert 0 < fetch.received_bytes <= 2 * shared.piece_length
    assert_same_files(folder, shared.folder)
