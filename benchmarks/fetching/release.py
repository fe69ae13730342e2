"""A release of noise, and our client that fetches it in a process of its own.

``python -m magnetar.benchmarks.fetching.release TORRENT STORE PEER...`` is what `Client` starts. It
prints a JSON line when it knows what is on the disk, and one when everything has arrived.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent.create import create_torrent

WEIGHTS = "consolidated.00.pth"
PIECE_BYTES = 1 << 20
"""As in large releases, where they are 1 to 16 MiB: a small one would have small pieces."""
_CHUNK_BYTES = 1 << 24


def write_release(folder: Path, num_bytes: int) -> bytes:
    """Noise under the names of a release; returns its .torrent."""
    folder.mkdir(parents=True)
    with (folder / WEIGHTS).open("wb") as file:
        while num_bytes:
            size = min(num_bytes, _CHUNK_BYTES)
            file.write(os.urandom(size))
            num_bytes -= size
    (folder / "tokenizer.model").write_bytes(b"t")
    (folder / "params.json").write_text("{}")
    return create_torrent(folder, piece_length=PIECE_BYTES)


class Client:
    """Our fetch of one torrent."""

    def __init__(self, torrent: Path, store: Path, peers: Sequence[str]) -> None:
        command = [sys.executable, "-m", __spec__.name, str(torrent), str(store), *peers]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait_until_checked(self) -> dict[str, Any]:
        """Until it knows what is on the disk."""
        return self._line()

    def wait(self) -> dict[str, Any]:
        """Until everything is there; what it counted."""
        found = self._line()
        self.process.wait()
        return found

    def kill(self) -> None:
        """Ends it as a crash would."""
        self.process.kill()
        self.process.wait()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def ignore(progress: Progress) -> None:
    """No progress is wanted."""


def read_bytes() -> int:
    """What this process has read from files so far, by the kernel's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def main() -> None:
    """Fetches, and says when and what."""
    parser = argparse.ArgumentParser()
    parser.add_argument("torrent")
    parser.add_argument("store", type=Path)
    parser.add_argument("peers", nargs="+")
    given = parser.parse_args()
    with Fetch(
        kind="torrent",
        location=given.torrent,
        store=given.store,
        peers=tuple(given.peers),
        timeout_s=60,
        on_progress=ignore,
        stop=threading.Event(),
    ) as fetch:
        fetch.metadata()
        before_bytes = read_bytes()
        fetch.join()
        print(json.dumps({"read_bytes": read_bytes() - before_bytes}), flush=True)
        fetch.download()
        done_s = time.time()
        found = {
            "done_s": done_s,
            "received_bytes": fetch.received_bytes,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
