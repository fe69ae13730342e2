"""The threads of this process: how long they computed and waited, and where they run.

By ``/proc/self/task/*/schedstat``, which Linux has; elsewhere nothing is known of them and nothing
is done with them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_TASKS: Final = Path("/proc/self/task")


def computed_ns() -> dict[int, int]:
    """Nanoseconds that each thread has had a processor, by its id."""
    found = {}
    for file in _TASKS.glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # one that has just ended
            found[int(file.parent.name)] = int(file.read_text().split()[0])
    return found


def busiest(since: Mapping[int, int], number: int) -> list[int]:
    """The threads that computed most after `computed_ns` gave `since`, the busiest first."""
    now = computed_ns()
    return sorted(now, key=lambda thread: since.get(thread, 0) - now[thread])[:number]


@contextmanager
def apart(threads: Sequence[int]) -> Iterator[None]:
    """Each on a processor of its own for a while, where there are exactly as many.

    Threads of a team that wake on one processor stay there where others keep all of them busy, and
    compute in turns.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    if len(allowed) != len(threads):
        yield
        return
    try:
        for thread, processor in zip(threads, sorted(allowed), strict=True):
            with suppress(OSError):
                os.sched_setaffinity(thread, {processor})
        yield
    finally:
        for thread in threads:
            with suppress(OSError):
                os.sched_setaffinity(thread, allowed)


class Waits:
    """How long the threads that there are at its beginning wait for processors from then on."""

    def __init__(self) -> None:
        self._files: list[int] = []

    def __enter__(self) -> Self:
        for file in _TASKS.glob("*/schedstat"):
            with suppress(OSError):
                self._files.append(os.open(file, os.O_RDONLY))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._files:
            os.close(self._files.pop())

    def total_s(self) -> float:
        """Of all together, since they began."""
        total_ns = 0
        for file in self._files:
            with suppress(OSError, ValueError, IndexError):
                total_ns += int(os.pread(file, 64, 0).split()[1])
        return total_ns / 1e9
