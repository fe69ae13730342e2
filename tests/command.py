"""The `magnetar` command in a process of its own, followed by its progress."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil

END_S = 60


class Command:
    """A `magnetar` process whose progress is read line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self.children: set[psutil.Process] = set()

    def until(self, kind: str) -> dict[str, Any]:
        """The next event of that kind; what came before it is in `events`."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if event["event"] == kind:
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end after its last word
                    self.children |= set(psutil.Process(self.process.pid).children(recursive=True))
                return event
        raise AssertionError(f"it ended without {kind!r}: {self.events[-3:]}")

    def last(self, phase: str) -> dict[str, Any]:
        """The last reading of a phase."""
        return [event for event in self.events if event.get("phase") == phase][-1]


@contextlib.contextmanager
def magnetar(*arguments: str) -> Iterator[Command]:
    """Runs a command; its children must be gone when it has ended."""
    command = [sys.executable, "-m", "magnetar.cli", *arguments, "--progress", "json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a test can press Ctrl-C
    ) as process:
        running = Command(process)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=END_S)
            _, alive = psutil.wait_procs(running.children, timeout=10)
            assert not alive, f"{alive} outlived the command: {errors}"
