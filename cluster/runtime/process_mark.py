"""A process that was seen before: its number alone may have gone to another one since."""

import os
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessMark:
    """A process that is told from a later one with the same number."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> "ProcessMark":
        """The process that has this number now."""
        return cls(pid=pid, started=psutil.Process(pid).create_time())

    @classmethod
    def of_this_process(cls) -> "ProcessMark":
        """The process that asks."""
        return cls.of(os.getpid())

    def process(self) -> psutil.Process | None:
        """The process if it still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None
