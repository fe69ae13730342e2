import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from magnetar.errors import InterruptedByUserError, PreflightError
from magnetar.fetcher.garbage import collect, sorted_out
from magnetar.fetcher.store import ReleaseFolder, Store
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import parse_metainfo

DAY_S = 86_400.0
NOW_S = 1_000 * DAY_S


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def add(store: Store, tmp_path: Path, name: str, *, used_s: float = 0.0) -> ReleaseFolder:
    """A release of 100 kB, last used then."""
    source = tmp_path / name
    source.mkdir()
    (source / "a").write_bytes(name.encode() * 20_000)
    metainfo = parse_metainfo(create_torrent(source))
    place = store.release_folder(metainfo.info_hash)
    place.save_metainfo(metainfo)
    (place.data / name).mkdir(parents=True)
    (place.data / name / "a").write_bytes((source / "a").read_bytes())
    place.lock()
    place.unlock()
    os.utime(place.root / "lock", (used_s, used_s))
    return place


def collected(store: Store, *, older_than_s: float = 0.0) -> dict[str, str]:
    done = collect(store, older_than_s=older_than_s, stop=threading.Event(), clock=lambda: NOW_S)
    return {garbage.release.name: garbage.reason for garbage in done}


def test_deletes_what_nobody_used_for_long(store: Store, tmp_path: Path) -> None:
    old = add(store, tmp_path, "alpha", used_s=NOW_S - 31 * DAY_S)
    new = add(store, tmp_path, "gamma", used_s=NOW_S - 29 * DAY_S)
    # The clock was wrong once: nothing is old because of that.
    future = add(store, tmp_path, "omega", used_s=NOW_S + 1000 * DAY_S)
    planned = sorted_out(store, older_than_s=30 * DAY_S, clock=lambda: NOW_S)
    assert [(each.release.name, each.reason) for each in planned] == [
        ("alpha", ""),
        ("gamma", "used lately"),
        ("omega", "used lately"),
    ]
    assert planned[0].release.num_bytes >= 100_000
    assert old.root.exists()
    assert collected(store, older_than_s=30 * DAY_S) == {
        "alpha": "",
        "gamma": "used lately",
        "omega": "used lately",
    }
    assert not old.root.exists()
    assert new.root.exists()
    assert future.root.exists()
    assert list(store.trash.iterdir()) == []


def test_keeps_what_another_process_reads_or_fetches_into(store: Store, tmp_path: Path) -> None:
    read = add(store, tmp_path, "alpha")
    fetched = add(store, tmp_path, "gamma")
    code = (
        "import pathlib, sys; from magnetar.fetcher.store import Store;"
        f"store = Store(pathlib.Path({str(store.root)!r}));"
        f"store.release_folder({read.info_hash!r}).use();"
        f"store.release_folder({fetched.info_hash!r}).lock();"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        planned = sorted_out(store, older_than_s=0, clock=lambda: NOW_S)
        assert [each.reason for each in planned] == ["in use", "in use"]
        assert collected(store) == {"alpha": "in use", "gamma": "in use"}
        # Also where it comes to be used only after it was looked at.
        for place in (read, fetched):
            with pytest.raises(PreflightError):
                store.release_folder(place.info_hash).discard(store.trash / "x")
        read.use()  # Any number may.
        read.end_use()
        process.kill()
        process.wait()
    assert collected(store) == {"alpha": "", "gamma": ""}
    assert store.releases() == ()


def test_what_a_crash_left_in_the_trash_is_deleted_next_time(store: Store, tmp_path: Path) -> None:
    place = add(store, tmp_path, "alpha")
    place.discard(store.trash / "x")
    assert store.releases() == ()
    assert (store.trash / "x" / "data" / "alpha" / "a").exists()
    assert collected(store) == {}
    assert list(store.trash.iterdir()) == []


def test_a_lock_on_a_deleted_release_is_taken_anew(store: Store, tmp_path: Path) -> None:
    place = add(store, tmp_path, "alpha")
    late = store.release_folder(place.info_hash)
    real_open = os.open
    gone: list[int] = []

    def open_and_lose(path: os.PathLike[str], *args: int, **kwargs: int) -> int:
        file = real_open(path, *args, **kwargs)
        if not gone and Path(path).name == "lock":
            gone.append(file)
            place.root.rename(tmp_path / "elsewhere")
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("magnetar.fetcher.store.os.open", open_and_lose)
        late.lock()
    with pytest.raises(PreflightError):
        store.release_folder(place.info_hash).lock()
    late.unlock()


def test_stops_between_releases(store: Store, tmp_path: Path) -> None:
    add(store, tmp_path, "alpha")
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedByUserError):
        collect(store, older_than_s=0, stop=stop, clock=lambda: NOW_S)
    assert len(store.releases()) == 1
