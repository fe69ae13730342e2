"""Which pieces of a download are in its files: told to readers, synced to the disk, on record."""

import time
from collections.abc import Iterable, Sequence
from typing import Final

from ..arrival import Arrival
from .holding import Holding
from .session import pieces_of
from .syncing import Syncing

RECORD_S: Final = 1.0
"""How often the record is renewed while the files are written."""


class Recording:
    """What is there of one download, as far as is known. One thread; `arrival` is for any."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._syncing = Syncing(holding.paths)
        self._recorded_s = 0.0
        self._synced_on_record: frozenset[int] = frozenset()
        self.arrival = Arrival()
        """What may be read of the files."""
        self.have: tuple[bool, ...] = ()
        """By piece, whether it has the right hash; the owner renews it, and `written` does."""
        self.is_done = False
        """All that is wanted is there and on record, and nothing was written since."""

    @property
    def pieces(self) -> frozenset[int]:
        """Those that are there."""
        return pieces_of(self.have)

    def missing(self, pieces: Iterable[int]) -> frozenset[int]:
        """Of these, those that are not there."""
        return frozenset(piece for piece in pieces if not self.have[piece])

    def restart(self) -> None:
        """Starts from what the store has on record."""
        self.is_done = self._holding.is_intact()
        self._synced_on_record = self._holding.synced()
        self._syncing.restart(self._synced_on_record)

    def tell(self) -> None:
        """Lets readers have what is there, and nothing else any more."""
        self.arrival.tell(self.pieces)

    def forget(self) -> None:
        """Claims nothing any more, to readers and on record."""
        self._holding.forget()
        self.arrival.tell(frozenset())

    def take_out(self, bad: set[int]) -> None:
        """These pieces are not right after all: they are missing, for readers and on record."""
        self.have = tuple(has and piece not in bad for piece, has in enumerate(self.have))
        self.tell()
        self.remember(done=False)

    def begin_writing(self) -> None:
        """The files change from now on, by our own hand."""
        self.is_done = False
        self._record_progress()

    def written(self, have: Sequence[bool]) -> None:
        """These pieces are in the files; the record says so about a second later at most."""
        self.have = tuple(have)
        pieces = self.pieces
        self.arrival.tell(pieces)
        self._syncing.keep_up(pieces)
        if time.monotonic() - self._recorded_s >= RECORD_S:
            self._record_progress()

    def remember(self, *, done: bool) -> None:
        """Puts on record what is there; `done`: all that is wanted, and nothing is under way."""
        self._write(done=done)
        self.is_done = done

    def complete(self) -> None:
        """All that is wanted is there: puts that on record, and begins to sync the files."""
        self.remember(done=True)
        self._syncing.keep_up(self.pieces, now=True)

    def finish(self) -> None:
        """Nothing writes any more: blocks until the files are on the disk, and records the rest."""
        self._syncing.finish(self.pieces)
        # What somebody else changed since it was done is not to be put on record as right.
        if not self.is_done or (
            self._syncing.pieces != self._synced_on_record and self._holding.is_on_record()
        ):
            self.remember(done=self.is_done)

    def _record_progress(self) -> None:
        self._recorded_s = time.monotonic()
        self._write(is_writing=True)

    def _write(self, *, done: bool = False, is_writing: bool = False) -> None:
        synced = self._syncing.pieces
        self._holding.remember(self.pieces, done=done, is_writing=is_writing, synced=synced)
        self._synced_on_record = synced
