"""What else a machine does while something is measured on it."""

from collections.abc import Iterator
from contextlib import suppress

import psutil


class OtherWork:
    """The work of others from now on: other processes, and other guests of the same host.

    The children of this process are not others, be it a compiler that has ended since.
    """

    def __init__(self) -> None:
        self._others_s, self._all_s = _seconds()

    def share(self) -> float:
        """Of all that the processors did or could have done since, 0 to 1."""
        others_s, all_s = _seconds()
        passed_s = all_s - self._all_s
        return min(1.0, max(0.0, (others_s - self._others_s) / passed_s)) if passed_s > 0 else 0.0


def _seconds() -> tuple[float, float]:
    """Of all processors since the machine started: what others took, and all there were."""
    every = psutil.cpu_times()
    own_s = sum(_own_seconds())
    idle_s = every.idle + getattr(every, "iowait", 0.0)
    # Guests of this machine are counted as users of it too.
    all_s = sum(every) - getattr(every, "guest", 0.0) - getattr(every, "guest_nice", 0.0)
    return all_s - idle_s - own_s, all_s


def _own_seconds() -> Iterator[float]:
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            yield times.user + times.system + times.children_user + times.children_system
