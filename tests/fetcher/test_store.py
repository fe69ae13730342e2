import os
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.errors import PreflightError, ReleaseError
from magnetar.fetcher.record import Record, fingerprints, replace_file
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import Metainfo, parse_metainfo

HASH = "a" * 40


def metainfo_of(tmp_path: Path) -> Metainfo:
    folder = tmp_path / "release"
    folder.mkdir(exist_ok=True)
    (folder / "a").write_bytes(b"x" * 100)
    return parse_metainfo(create_torrent(folder))


def test_a_second_holder_is_told_who_has_the_release(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = store.release_folder(HASH), store.release_folder(HASH)
    first.lock()
    first.lock()
    with pytest.raises(PreflightError, match=f"process {os.getpid()} on .* is working on this"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_another_process_is_locked_out_until_this_one_ends(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from magnetar.fetcher.store import Store;"
        f"Store(pathlib.Path({str(tmp_path)!r})).release_folder({HASH!r}).lock();"
        "print('locked', flush=True); sys.stdin.read()"
    )
    place = Store(tmp_path).release_folder(HASH)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(PreflightError, match=f"process {process.pid} "):
            place.lock()
        process.kill()
        process.wait()
    place.lock()
    place.unlock()


def test_keeps_metainfo_only_under_its_own_hash(tmp_path: Path) -> None:
    metainfo = metainfo_of(tmp_path)
    place = Store(tmp_path).release_folder(metainfo.info_hash)
    assert place.metainfo() is None
    place.save_metainfo(metainfo)
    assert place.metainfo() == metainfo
    other = Store(tmp_path).release_folder(HASH)
    other.save_metainfo(metainfo)
    assert other.metainfo() is None


def test_a_damaged_torrent_file_counts_as_none(tmp_path: Path) -> None:
    metainfo = metainfo_of(tmp_path)
    place = Store(tmp_path).release_folder(metainfo.info_hash)
    replace_file(place.root / "torrent", metainfo.raw[:-5])
    assert place.metainfo() is None


def test_a_link_out_of_the_store_is_refused(tmp_path: Path) -> None:
    place = Store(tmp_path / "store").release_folder(HASH)
    place.data.mkdir(parents=True)
    (place.data / "release").symlink_to(tmp_path)
    with pytest.raises(ReleaseError, match="leads out"):
        place.refuse_escape(["release/a"])
    place.refuse_escape(["other/a"])


def test_lists_its_releases_and_whether_they_are_complete(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.releases() == ()
    metainfo = metainfo_of(tmp_path)
    place = store.release_folder(metainfo.info_hash)
    place.save_metainfo(metainfo)
    assert [release.complete for release in store.releases()] == [False]
    folder = place.data / "release"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"x" * 100)
    place.record.write(
        Record(
            complete=True, files=fingerprints(place.data, [file.path for file in metainfo.files])
        )
    )
    (release,) = store.releases()
    assert (release.name, release.complete, release.folder) == ("release", True, folder)
    (folder / "a").write_bytes(b"y" * 99)
    assert [release.complete for release in store.releases()] == [False]
