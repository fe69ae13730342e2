"""Holding a download while its disk is short of room."""

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from .disk_room import DiskRoom
from .session import TorrentSession, TorrentStatus

LOOK_S: Final = 1.0
"""How often the disk is asked for its room."""


class Look(NamedTuple):
    """What one look at the disk brought."""

    is_short: bool
    message: str = ""
    """What to tell a user; empty when there is nothing new to tell."""
    must_recheck: bool = False
    """A write failed earlier: a piece can have passed its hash and not have reached the disk."""


class RoomWatch:
    """Holds a session while there is too little room, and lets it go on by itself. One thread."""

    def __init__(
        self, session: TorrentSession, *, now_s: float, free_bytes: Callable[[Path], int]
    ) -> None:
        self._session = session
        self._free_bytes = free_bytes
        self._room = DiskRoom()
        self._looked_s = now_s

    @property
    def has_failed(self) -> bool:
        """A write failed for want of room, and there is none yet."""
        return self._room.has_failed

    def ran_full(self, now_s: float) -> None:
        """A write failed for want of room."""
        self._session.hold()
        self._room.ran_full(now_s)

    def look(self, folder: Path, status: TorrentStatus, now_s: float) -> Look:
        """Whether the download into the folder must wait; asks the disk about once a second."""
        was_short, had_failed = self._room.is_short, self._room.has_failed
        if now_s - self._looked_s < LOOK_S:
            return Look(was_short)
        self._looked_s = now_s
        missing = status.wanted_bytes - status.wanted_done_bytes
        free = self._free_bytes(folder)
        if self._room.look(free, missing, now_s):
            if not was_short:
                self._session.hold()
            return Look(
                True,
                f"paused: {missing / 1e6:,.1f} MB are to come and {free / 1e6:,.1f} MB are free; "
                f"make room on the disk of {folder}, and it goes on by itself",
            )
        if was_short:
            self._session.go_on()
        return Look(False, must_recheck=was_short and had_failed)
