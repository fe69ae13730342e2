"""The command line: one command runs, and a failure becomes one line and an exit code.

The verbs are in `commands`; their modules are light, so that ``magnetar --help`` answers at once.
"""

import errno
import importlib.util
import os
import shlex
import sys
import threading
import traceback
from collections.abc import Sequence
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
from .commands.logs import send_logs_to
from .commands.parser import build_parser
from .commands.stopping import stopping, stopping_at_once
from .errors import InterruptedByUserError, MagnetarError, PreflightError

# What can be taken up again where it was left, by running the same command.
_RESUMABLE = frozenset({"up", "demo", "fetch", "verify", "plan", "inspect", "down"})
_NO_ACCESS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    stop = threading.Event()
    console = Console(args.progress)
    send_logs_to(console, debug=args.debug)
    try:
        with console, stopping_at_once() if args.ends_at_once else stopping(stop, console):
            args.body(args, console, stop)
    except BrokenPipeError:
        # Whoever read our output has gone; closing stdout again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            traceback.print_exc()
        text, code = _failure(error, debug=args.debug)
        if code == InterruptedByUserError.exit_code and args.verb in _RESUMABLE:
            command = shlex.join(["magnetar", *arguments])
            text += f"\nGo on where it stopped with:\n  {command}"
        fields = error.fields() if isinstance(error, MagnetarError) else {}
        console.error(text, exit_code=code, **fields)
        return code
    return 0


def _failure(error: BaseException, *, debug: bool) -> tuple[str, int]:
    """What a failure is called, and the exit code."""
    match error:
        case KeyboardInterrupt():
            return "interrupted", InterruptedByUserError.exit_code
        case MagnetarError():
            return str(error) or "interrupted", error.exit_code
        case OSError() if error.filename and error.errno in _NO_ACCESS:
            return (
                f"{error.filename} cannot be used ({error.strerror}): allow that, or name other "
                "folders by --store and the variable MAGNETAR_HOME",
                PreflightError.exit_code,
            )
    hint = "" if debug else "; --debug shows where"
    return f"an error that Magnetar does not expect: {type(error).__name__}: {error}{hint}", 1


if __name__ == "__main__":
    sys.exit(main())
