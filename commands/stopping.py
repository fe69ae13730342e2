"""Ctrl-C and SIGTERM: the first one asks a command to stop, the second one ends it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from .console import Console


@contextlib.contextmanager
def stopping(stop: threading.Event, console: Console) -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM set ``stop``; the second one ends the process at once."""

    def handle(number: int, _frame: object) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stop.set()
        # In a thread: the main thread may be in the middle of printing.
        text = "stopping; once more ends it at once"
        threading.Thread(target=console.note, args=(text,), name="stop-note", daemon=True).start()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
