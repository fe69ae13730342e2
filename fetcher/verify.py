"""The md5 sums that a release publishes about itself, and checking files against them.

A RELEASE file is a text banner; its sums stand in rows between box-drawing characters:
``║ 1faa9bc9b20fcfe81fcd4eb7166a79e6  consolidated.00.pth ║``. They travel in the same torrent as
the files, so they find damage and wrong uploads, and prove nothing about the origin.
"""

import hashlib
import logging
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from ..errors import InterruptedByUserError, ReleaseError, VerifyError
from .progress import Progress, ProgressSink
from .record import RecordFile, fingerprints

CHUNK_BYTES = 4 << 20
MAX_BANNER_BYTES = 1 << 20
REPORT_S = 0.2

logger = logging.getLogger(__name__)

_MD5 = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{32}(?![0-9A-Za-z])", re.IGNORECASE)
_FILE_NAME = re.compile(r"(?<!\S)[\w.-]+\.[\w.-]+(?!\S)")


def parse_release_sums(text: str) -> dict[str, str]:
    """File name -> md5 of every row between ``║`` that holds both; column order does not matter.

    Raises:
        ReleaseError: two rows give one file different sums.
    """
    sums: dict[str, str] = {}
    for line in text.splitlines():
        if "║" not in line:
            continue
        row = line.replace("║", " ").replace("│", " ").replace("|", " ")
        digests = _MD5.findall(row)
        names = _FILE_NAME.findall(_MD5.sub(" ", row))
        if len(digests) != 1 or len(names) != 1:
            continue
        digest = digests[0].lower()
        if sums.setdefault(names[0], digest) != digest:
            raise ReleaseError(
                f"RELEASE gives two md5 sums for {names[0]}, {sums[names[0]]} and {digest}: "
                "the release is broken"
            )
    return sums


def read_release_sums(folder: Path) -> dict[str, str]:
    """The sums of the folder's RELEASE file; empty when there is none."""
    path = folder / "RELEASE"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BANNER_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read ({error.strerror})") from error
    return parse_release_sums(raw.decode(errors="replace"))


class Md5Check:
    """Checks files one after the other with one progress bar over all of them."""

    def __init__(
        self,
        *,
        folder: Path,
        sums: Mapping[str, str],
        on_progress: ProgressSink,
        stop: threading.Event,
        node: str = "",
    ) -> None:
        self._folder = folder
        self._sums = sums
        self._on_progress = on_progress
        self._stop = stop
        self._node = node
        self._done_bytes = 0
        self._total_bytes = sum((folder / name).stat().st_size for name in sums)
        self._started_s = time.monotonic()
        self._reported_s = 0.0

    @property
    def done_bytes(self) -> int:
        """Bytes hashed so far."""
        return self._done_bytes

    def check(self, name: str) -> str:
        """Hashes one file from the disk and returns its md5.

        Raises:
            VerifyError: it is not the published one. InterruptedByUserError: `stop` was set.
        """
        # The sum is checked against damage only, and the format is md5: nothing to choose here.
        digest = hashlib.md5(usedforsecurity=False)
        with (self._folder / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                if self._stop.is_set():
                    raise InterruptedByUserError(f"stopped while checking {name}")
                digest.update(chunk)
                self._done_bytes += len(chunk)
                self._report(name)
        if (found := digest.hexdigest()) != self._sums[name]:
            raise VerifyError(
                f"{self._folder / name} has md5 {found}, but RELEASE says {self._sums[name]}: "
                "delete the file and fetch it again, or fetch the release from elsewhere"
            )
        return found

    def _report(self, name: str) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < REPORT_S:
            return
        self._reported_s = now_s
        self._on_progress(
            Progress(
                phase="verify",
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes,
                rate_bytes_per_s=self._done_bytes / max(now_s - self._started_s, 1e-6),
                message=f"md5 of {name}",
                node=self._node,
            )
        )


def check_release_sums(
    *,
    base: Path,
    root: str,
    record_file: RecordFile,
    on_progress: ProgressSink,
    stop: threading.Event,
    node: str = "",
    partial: Collection[str] = (),
) -> int:
    """Checks the RELEASE rows of files that were not checked as they are now.

    The release is at ``base/root``; the record names files relative to `base`, and so does
    `partial` those of which only a part is there: their sums say nothing. Each file that passes is
    recorded at once, so that an interrupted check goes on with the next one. Returns the bytes that
    were read.

    Raises:
        VerifyError: a file has another md5. InterruptedByUserError: `stop` was set.
    """
    folder = base / root
    record = record_file.read()
    sums = read_release_sums(folder)
    now = fingerprints(base, [root + name for name in sums])
    due = {}
    for name, digest in sums.items():
        path = root + name
        if path not in now:
            logger.warning("RELEASE names %s, which is not in %s", name, folder)
        elif path not in partial and (
            record.md5.get(path) != digest or record.files.get(path) != now[path]
        ):
            due[name] = digest
    check = Md5Check(folder=folder, sums=due, on_progress=on_progress, stop=stop, node=node)
    for name in due:
        digest = check.check(name)
        path = root + name
        record = replace(
            record,
            files={**record.files, path: now[path]},
            md5={**record.md5, path: digest},
        )
        record_file.write(record)
    return check.done_bytes
