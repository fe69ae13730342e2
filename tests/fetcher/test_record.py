import json
import os
from pathlib import Path

import pytest

from magnetar.errors import DownloadError
from magnetar.fetcher.record import Fingerprint, Record, RecordFile, fingerprints, replace_file


def test_a_record_comes_back_as_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "sub" / "record.json")
    assert file.read() == Record()
    record = Record(
        complete=True,
        files={"a/b": Fingerprint(size=3, mtime_ns=4)},
        md5={"a/b": "00"},
        pieces=frozenset({0, 1, 2, 7, 9, 10}),
        is_writing=True,
        boot="b",
        synced=frozenset({1, 9}),
    )
    file.write(record)
    assert file.read() == record
    assert record.lasting("b") == record.pieces
    assert record.lasting("c") == {1, 9}


def test_a_record_cut_at_any_byte_counts_as_none(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "record.json")
    file.write(Record(pieces=frozenset(range(5)), files={"a": Fingerprint(size=3, mtime_ns=4)}))
    raw = (tmp_path / "record.json").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "record.json").write_bytes(raw[:length])
        assert file.read() == Record()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        json.dumps({"version": 99}).encode(),
        *(
            json.dumps(
                {"version": 1, "complete": False, "files": {}, "md5": {}, "pieces": pieces}
            ).encode()
            for pieces in ("1", "2-1", "-1-2", "0-99999999999", "a-b", 7)
        ),
    ],
)
def test_an_unreadable_record_counts_as_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "record.json").write_bytes(raw)
    assert RecordFile(tmp_path / "record.json").read() == Record()


def test_fingerprints_change_with_size_and_time_but_not_with_allocation(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    before = fingerprints(tmp_path, ["a", "missing", "a/below"])
    assert set(before) == {"a"}
    os.utime(path, ns=(1, before["a"].mtime_ns + 1))
    assert fingerprints(tmp_path, ["a"]) != before
    assert Fingerprint(size=1, mtime_ns=1, allocated=0) == Fingerprint(
        size=1, mtime_ns=1, allocated=4096
    )


def test_replacing_a_file_leaves_no_draft_behind(tmp_path: Path) -> None:
    replace_file(tmp_path / "a" / "f", b"1")
    replace_file(tmp_path / "a" / "f", b"2")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["f"]
    assert (tmp_path / "a" / "f").read_bytes() == b"2"


def test_replacing_says_why_the_disk_did_not_take_it(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "inside").touch()
    with pytest.raises(DownloadError, match="could not be written"):
        replace_file(tmp_path / "f", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
