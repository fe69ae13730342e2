"""What wakes a thread that waits for a link, because something else has come for it."""

import contextlib
import socket


class Bell:
    """Any thread rings it; see `StageLink.wait` for who hears."""

    def __init__(self) -> None:
        self._ear, self._hammer = socket.socketpair()
        self._ear.setblocking(False)
        self._hammer.setblocking(False)

    def fileno(self) -> int:
        """Readable from a ring on, until `hush`."""
        return self._ear.fileno()

    def ring(self) -> None:
        """Wake who waits, or who waits next; after `close` nobody does."""
        with contextlib.suppress(OSError):  # closed, or full of rings that nobody has heard yet
            self._hammer.send(b"\0")

    def hush(self) -> None:
        """Forget the rings so far."""
        with contextlib.suppress(BlockingIOError):
            self._ear.recv(4096)

    def close(self) -> None:
        """Give the sockets back."""
        self._ear.close()
        self._hammer.close()
