"""A real seeder: another process with a libtorrent session of its own.

``with seeding(folder) as info:`` in tests; ``python -m magnetar.tests.seeder FOLDER`` is what it
starts. The process ends when its standard input closes, so it never outlives the test.
"""

import argparse
import base64
import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from magnetar.fetcher.torrent.seed import SeedInfo, SeedLimits, seed

READY_S = 60.0
END_S = 20.0


@contextlib.contextmanager
def seeding(
    folder: Path,
    *,
    listen: str = "127.0.0.1:0",
    upload_bytes_per_s: int = 0,
    cache: Path | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[SeedInfo]:
    """Shares the folder from another process while the block runs.

    `prefix` stands before the command, to run it elsewhere. The limit is exact only above some
    hundred kB/s; 0 is none.
    """
    command = [
        *prefix,
        sys.executable,
        "-m",
        "magnetar.tests.seeder",
        str(folder),
        "--listen",
        listen,
    ]
    command += ["--upload-bytes-per-s", str(upload_bytes_per_s)]
    if cache is not None:
        command += ["--cache", str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(READY_S, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                raise RuntimeError(f"the seeder of {folder} ended with {process.wait()}")
            ready = json.loads(line)
            yield SeedInfo(**{**ready, "torrent": base64.b64decode(ready["torrent"])})
        finally:
            watchdog.cancel()
            process.stdin.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    """Seeds until standard input closes; prints one JSON line when others can connect."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--upload-bytes-per-s", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    def say(info: SeedInfo) -> None:
        torrent = base64.b64encode(info.torrent).decode()
        print(json.dumps({**dataclasses.asdict(info), "torrent": torrent}), flush=True)

    threading.Thread(target=wait_for_end, name="seeder-end", daemon=True).start()
    seed(
        arguments.folder,
        listen=arguments.listen,
        on_ready=say,
        stop=stop,
        cache=arguments.cache,
        limits=SeedLimits(upload_bytes_per_s=arguments.upload_bytes_per_s),
    )


if __name__ == "__main__":
    main()
