"""What every verb of the command line has: a name, options, a body, and errors that help.

Imported for ``magnetar --help``, and so are the modules of the verbs: nothing heavier than the
standard library, and this package's plain data. Bodies bring in what they need.
"""

import argparse
import re
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from .console import Console
from .option_groups import add_common

Body = Callable[[argparse.Namespace, Console, threading.Event], None]
"""Runs a verb: its arguments in, data out, until it is done or told to stop."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what was probably meant, and where it is told."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuses what is unknown itself: a verb knows its own options best."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"{unknown[0]} is not known here{_guess(unknown[0], known)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the process: what is wrong, and where what is right can be read."""
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += _guess(match[1], re.findall(r"'([^']*)'", match[2]))
        self.exit(2, f"magnetar: {message}\nAll that may be asked: {self.prog} --help\n")


class Verbs:
    """The verbs of a parser; each module of verbs adds its own."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parsers = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
        self._common = Parser(add_help=False)
        add_common(self._common.add_argument_group("output"), progress=argparse.SUPPRESS)

    def add(
        self,
        name: str,
        body: Body,
        help: str,
        description: str = "",
        *,
        ends_at_once: bool = False,
    ) -> argparse.ArgumentParser:
        """A verb that has no options of its own yet; parsed arguments carry its body.

        `ends_at_once` says that it leaves nothing half done: the first Ctrl-C raises in it, and its
        event is never set.
        """
        parser: argparse.ArgumentParser = self._parsers.add_parser(
            name,
            help=help,
            description=description or f"{help[0].upper()}{help[1:]}.",
            parents=[self._common],
        )
        parser.set_defaults(body=body, ends_at_once=ends_at_once)
        return parser


def _guess(word: str, known: list[str]) -> str:
    from ..manifests.suggest import did_you_mean

    return did_you_mean(word, known)
