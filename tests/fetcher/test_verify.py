import hashlib
import threading
from pathlib import Path

import pytest

from magnetar.errors import InterruptedByUserError, ReleaseError, VerifyError
from magnetar.fetcher import verify
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.record import RecordFile
from magnetar.fetcher.verify import check_release_sums, parse_release_sums

PTH, TOKENIZER = "1faa9bc9b20fcfe81fcd4eb7166a79e6", "37974873eb68a7ab30c4912fc36264ae"
BANNER = f"""
╔══════════════════════════════════════════════════════════════════════════╗
║                           .----------.                                   ║
║  ~ release v0.1, see https://example.com/a1b2.c3                          ║
╠══════════════════════════════════════════════════════════════════════════╣
║  md5                                                                      ║
║  {PTH}  consolidated.00.pth                     ║
║  {TOKENIZER}  tokenizer.model                         ║
╚══════════════════════════════════════════════════════════════════════════╝
{"0" * 32}  outside.bin
"""


def test_reads_the_rows_between_box_characters() -> None:
    assert parse_release_sums(BANNER) == {"consolidated.00.pth": PTH, "tokenizer.model": TOKENIZER}


@pytest.mark.parametrize(
    "row",
    [
        f"║ consolidated.00.pth ║ {PTH} ║",
        f"║consolidated.00.pth│{PTH.upper()}║",
        f"║ {PTH} | consolidated.00.pth ║",
    ],
)
def test_takes_columns_in_either_order(row: str) -> None:
    assert parse_release_sums(row) == {"consolidated.00.pth": PTH}


@pytest.mark.parametrize(
    "row", ["", "║ no sum here ║", f"║ {PTH} ║", f"║ {PTH}0 a.b ║", f"║ {PTH} ../a.b ║"]
)
def test_other_rows_say_nothing(row: str) -> None:
    assert parse_release_sums(row) == {}


def test_two_sums_for_one_file_are_refused() -> None:
    with pytest.raises(ReleaseError, match=r"two md5 sums for a\.b"):
        parse_release_sums(f"║ {PTH} a.b ║\n║ {TOKENIZER} a.b ║")


class Release:
    """A folder with a RELEASE file that covers two files, and its record."""

    def __init__(self, tmp_path: Path) -> None:
        self.base = tmp_path / "data"
        self.folder = self.base / "release"
        self.folder.mkdir(parents=True)
        self.contents = {"w.bin": b"weights" * 1000, "t.model": b"tokens"}
        rows = []
        for name, data in self.contents.items():
            (self.folder / name).write_bytes(data)
            rows.append(f"║ {hashlib.md5(data).hexdigest()} {name} ║")
        (self.folder / "RELEASE").write_text("\n".join(rows))
        self.record = RecordFile(tmp_path / "record.json")
        self.told: list[Progress] = []
        self.stop = threading.Event()

    def check(self) -> int:
        return check_release_sums(
            base=self.base,
            root="release/",
            record_file=self.record,
            on_progress=self.told.append,
            stop=self.stop,
        )


def test_reads_each_file_once_and_not_again(tmp_path: Path) -> None:
    release = Release(tmp_path)
    total = sum(map(len, release.contents.values()))
    assert release.check() == total
    assert release.told[0].phase == "verify"
    assert release.told[0].total_bytes == total
    assert release.check() == 0
    (release.folder / "t.model").write_bytes(b"tokens")
    assert release.check() == len(b"tokens")


def test_a_mismatch_names_the_file_and_both_sums(tmp_path: Path) -> None:
    release = Release(tmp_path)
    (release.folder / "t.model").write_bytes(b"tokenz")
    with pytest.raises(VerifyError) as caught:
        release.check()
    message = str(caught.value)
    assert str(release.folder / "t.model") in message
    assert hashlib.md5(b"tokens").hexdigest() in message
    assert hashlib.md5(b"tokenz").hexdigest() in message


def test_what_passed_before_a_stop_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Release(tmp_path)
    monkeypatch.setattr(verify, "REPORT_S", 0.0)

    def stop_at_second(progress: Progress) -> None:
        if progress.message == "md5 of w.bin":
            release.stop.set()

    with pytest.raises(InterruptedByUserError, match=r"t\.model"):
        check_release_sums(
            base=release.base,
            root="release/",
            record_file=release.record,
            on_progress=stop_at_second,
            stop=release.stop,
        )
    release.stop.clear()
    assert release.check() == len(b"tokens")


def test_a_row_about_a_file_that_is_not_there_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = Release(tmp_path)
    (release.folder / "t.model").unlink()
    assert release.check() == len(release.contents["w.bin"])
    assert "RELEASE names t.model" in caplog.text


def test_without_a_release_file_nothing_is_read(tmp_path: Path) -> None:
    release = Release(tmp_path)
    (release.folder / "RELEASE").unlink()
    assert release.check() == 0
