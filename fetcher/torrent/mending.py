"""Damage on the disk that somebody finds while the download is still under way."""

import threading
from dataclasses import dataclass, field


class CalledAwayError(Exception):
    """The download stops for a moment to look at pieces again; never for a user."""


@dataclass(eq=False, slots=True)
class Ask:
    """One request to look at pieces again."""

    pieces: frozenset[int]
    looked: threading.Event = field(default_factory=threading.Event)
    """They were, and what was bad of them counts as missing; or nobody will any more."""


class Mending:
    """Requests of any thread, for the one that downloads. Closed except while it does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asks: list[Ask] = []
        self._is_open = False

    def open(self) -> None:
        """Requests are taken from now on."""
        with self._lock:
            self._is_open = True

    def close(self) -> None:
        """No more; nobody waits any longer."""
        with self._lock:
            self._is_open = False
            asks, self._asks = self._asks, []
        for ask in asks:
            ask.looked.set()

    def ask(self, pieces: frozenset[int]) -> Ask | None:
        """Has these looked at; None where no download is under way."""
        with self._lock:
            if not self._is_open:
                return None
            self._asks.append(Ask(pieces))
            return self._asks[-1]

    @property
    def is_asked(self) -> bool:
        """Whether anybody waits."""
        return bool(self._asks)

    @property
    def is_open(self) -> bool:
        """Whether a download is under way."""
        return self._is_open

    def take(self) -> list[Ask]:
        """All requests, whose `looked` is to be set."""
        with self._lock:
            asks, self._asks = self._asks, []
            return asks
