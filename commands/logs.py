"""What Magnetar's own modules log is told to whoever runs a command."""

import logging

from .console import Console


def send_logs_to(console: Console, *, debug: bool) -> None:
    """Warnings become warnings of the command, and with `debug` the rest becomes notes."""
    logger = logging.getLogger("magnetar")
    logger.handlers = [_ConsoleHandler(console)]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False


class _ConsoleHandler(logging.Handler):
    """Log records of Magnetar's own modules become notes of the command."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say = self._console.warning if record.levelno >= logging.WARNING else self._console.note
        say(self.format(record))
