"""Damage on the disk costs the pieces it is in."""

import hashlib
import os
from pathlib import Path

import pytest

from magnetar.errors import (
    VerifyError,
)
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


@pytest.mark.parametrize("between", ["runs", "download and verify"])
def test_a_corrupt_byte_costs_one_piece(shared: Shared, fetching: Fetching, between: str) -> None:
    def corrupt(folder: Path) -> None:
        with (folder / WEIGHTS).open("r+b") as file:
            file.seek(WEIGHTS_BYTES // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    if between == "runs":
        corrupt(complete(fetching(shared.info.magnet)))
        fetch = fetching(shared.info.magnet)
        before = 0
    else:
        fetch = fetching(shared.info.magnet)
        corrupt(fetch.download())
        before = fetch.received_bytes
    with fetch:
        fetch.verify()
        folder = fetch.download()
        assert fetch.received_bytes - before == shared.piece_length
    assert_same_files(folder, shared.folder)
    complete(fetching(shared.info.magnet, offline=True))


def test_damage_that_kept_size_and_time_shows_in_the_md5_and_is_mended(
    shared: Shared, fetching: Fetching
) -> None:
    with fetching(shared.info.magnet) as fetch:
        folder = fetch.download()
        path = folder / "tokenizer.model"
        times = path.stat()
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        fetch.verify()
    assert_same_files(folder, shared.folder)


def test_truncated_and_deleted_files_come_back(shared: Shared, fetching: Fetching) -> None:
    folder = complete(fetching(shared.info.magnet))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1_000_000])
    (folder / "params.json").unlink()
    with fetching(shared.info.magnet) as fetch:
        assert fetch.download() == folder
        fetch.verify()
        assert fetch.received_bytes < shared.wanted_bytes * 0.75
    assert_same_files(folder, shared.folder)


def test_a_wrong_published_md5_names_the_file_and_both_sums(
    tmp_path: Path, fetching: Fetching
) -> None:
    folder = write_files(tmp_path / "wrong")
    write_sums(folder, WEIGHTS)
    published = hashlib.md5((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / WEIGHTS).write_bytes(b"other weights" * 1000)
    found = hashlib.md5((folder / WEIGHTS).read_bytes()).hexdigest()
    with seeding(folder) as info, fetching(info.magnet) as fetch:
        with pytest.raises(VerifyError) as caught:
            fetch.verify()
        for part in (WEIGHTS, published, found):
            assert part in str(caught.value)
