"""The command line: one command runs, and a failure becomes one line and an exit code.

Only light modules are imported here, so that ``magnetar --help`` answers at once; the bodies
of the commands are in `commands` and bring in what they need.
"""

import contextlib
import importlib.util
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # `python cli.py` in a checkout: give the folder its name, so that relative imports work.
    _root = Path(__file__).resolve().parent
    _spec = importlib.util.spec_from_file_location(
        "magnetar", _root / "__init__.py", submodule_search_locations=[str(_root)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    _package = importlib.util.module_from_spec(_spec)
    sys.modules["magnetar"] = _package
    _spec.loader.exec_module(_package)
    __package__ = "magnetar"

from .commands.console import Console
from .commands.options import build_parser
from .errors import InterruptedByUserError, MagnetarError

# What can be taken up again where it was left, by running the same command.
_RESUMABLE = frozenset({"up", "demo", "fetch", "verify", "plan", "inspect"})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    stop = threading.Event()
    console = Console(args.progress)
    _send_logs_to(console, debug=args.debug)
    try:
        with console, _stopping(stop, console):
            from .commands.verbs import COMMANDS

            COMMANDS[args.verb](args, console, stop)
    except BrokenPipeError:
        # Whoever read our output has gone; closing stdout again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MagnetarError, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        if isinstance(error, MagnetarError) and not isinstance(error, InterruptedByUserError):
            console.error(str(error), exit_code=error.exit_code)
            return error.exit_code
        code = InterruptedByUserError.exit_code
        console.error(_how_to_resume(str(error), args.verb, arguments), exit_code=code)
        return code
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        hint = "" if args.debug else "; --debug shows where"
        console.error(f"an error that Magnetar does not expect: {text}{hint}", exit_code=1)
        return 1
    return 0


@contextlib.contextmanager
def _stopping(stop: threading.Event, console: Console) -> Iterator[None]:
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


def _how_to_resume(text: str, verb: str, arguments: list[str]) -> str:
    said = text or "interrupted"
    if verb not in _RESUMABLE:
        return said
    return f"{said}\nGo on where it stopped with:\n  {shlex.join(['magnetar', *arguments])}"


class _ConsoleHandler(logging.Handler):
    """Log records of Magnetar's own modules become notes of the command."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say = self._console.warning if record.levelno >= logging.WARNING else self._console.note
        say(self.format(record))


def _send_logs_to(console: Console, *, debug: bool) -> None:
    logger = logging.getLogger("magnetar")
    logger.handlers = [_ConsoleHandler(console)]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
