"""Ctrl-C and SIGTERM: the first one asks a command to stop, the second one ends it.

What only looks, and leaves nothing half done, does not wait to be asked: see `stopping_at_once`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from .console import Console

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user's signal, in a command that it ends at once.

    A class of its own, for a `KeyboardInterrupt` that passes through text given to `exec`, as
    `dataclasses` does it, makes CPython end with the signal in place of the exit code of the
    command, although it was caught (`run_eval_code_obj` in its `pythonrun.c`).
    """


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

    with _handling(handle):
        yield


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM raise `Interrupted` where the main thread is; the second one
    ends the process, whatever is still being closed."""

    def handle(_number: int, _frame: object) -> None:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        raise Interrupted

    with _handling(handle):
        yield


@contextlib.contextmanager
def _handling(handle: Callable[[int, object], None]) -> Iterator[None]:
    before = [signal.signal(number, handle) for number in _NUMBERS]
    try:
        yield
    finally:
        for number, handler in zip(_NUMBERS, before, strict=True):
            signal.signal(number, handler)
