"""A Ray that outlives the command that wanted it.

``python -m magnetar.cluster.runtime.ray_head FILE``: a process of its own session. It
writes its address into FILE and stays until SIGTERM.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from ...errors import InterruptedByUserError, MagnetarError, TimedOutError
from ..journal import FileJournal
from .process_mark import ProcessMark
from .ray_runtime import local_ray, prepare_environment

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0


def start_head(address_file: Path, *, log: Path, stop: threading.Event) -> tuple[ProcessMark, str]:
    """Start the process, wait until its Ray answers; its mark and its address.

    Raises:
        MagnetarError: it ended at once; the message has the end of `log`.
        TimedOutError: it did not come up.
        InterruptedByUserError: `stop` was set; the process is ended.
    """
    prepare_environment()
    journal = FileJournal(address_file)
    journal.forget()
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not subprocess: its object would insist on waiting for a process that is to outlive us.
    arguments = [sys.executable, "-m", "magnetar.cluster.runtime.ray_head", str(address_file)]
    write_log = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    pid = os.posix_spawn(
        sys.executable,
        arguments,
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), write_log, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    mark = ProcessMark.of(pid)
    deadline = time.monotonic() + START_TIMEOUT_S
    while (record := journal.read()) is None:
        if mark.process() is None:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise MagnetarError(f"Ray did not start ({' '.join(tail)}); see {log}")
        if stop.wait(0.1):
            stop_head(mark)
            raise InterruptedByUserError("stopped before Ray was up; nothing is left running")
        if time.monotonic() > deadline:
            stop_head(mark)
            raise TimedOutError(f"Ray was not up after {START_TIMEOUT_S:.0f} s; see {log}")
    journal.forget()
    return mark, str(record["address"])


def stop_head(mark: ProcessMark) -> bool:
    """End the process and with it its Ray; False if it had ended before."""
    process = mark.process()
    if process is None:
        return False
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
    return True


def main(address_file: str) -> None:
    """Run until SIGTERM."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with local_ray() as address:
        FileJournal(Path(address_file)).write({"address": address})
        ended.wait()


if __name__ == "__main__":
    main(sys.argv[1])
