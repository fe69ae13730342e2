"""What a torrent session has said so far, and waiting for what it says when it is asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from ...errors import DiskFullError, DownloadError
from .addresses import Address
from .caution import Caution
from .contacts import Contacts, shown
from .events import (
    BadPiece,
    Event,
    Flushed,
    Listening,
    MetadataArrived,
    PeerBanned,
    ResumeData,
    StorageFailed,
)
from .meter import Meter
from .room_watch import RoomWatch
from .session import TorrentSession
from .write_out import WriteOut

POLL_S: Final = 0.1
FRESH_S: Final = 2.0
"""How long a new session may take to say where it listens."""
ANSWER_S: Final = 60.0
"""How long the session itself may take for what needs no network."""


class Answers:
    """Takes every event of a session and tells whom it concerns. One thread.

    Whatever takes events raises DownloadError when the disk failed, DiskFullError when it is full.
    """

    def __init__(
        self,
        session: TorrentSession,
        *,
        contacts: Contacts,
        meter: Meter,
        room: RoomWatch,
        caution: Caution,
        write_out: WriteOut,
        on_resume_data: Callable[[bytes], None],
        clock: Callable[[], float],
    ) -> None:
        self._session = session
        self._contacts = contacts
        self._meter = meter
        self._room = room
        self._caution = caution
        self._write_out = write_out
        self._on_resume_data = on_resume_data
        self._clock = clock
        self._seen: set[type] = set()
        self._listens: list[Address] = []
        self.metadata: bytes | None = None
        """The info dictionary, once it came."""
        self.bad_pieces: set[int] = set()
        """Those that had a wrong hash; the owner clears it."""

    def has(self, kind: type[Event]) -> bool:
        """Whether there was such an event since `forget`."""
        return kind in self._seen

    def forget(self, kind: type[Event]) -> None:
        """Lets such events that were before count no more."""
        self._seen.discard(kind)

    def poll(self, timeout_s: float = POLL_S, *, waits_for_room: bool = False) -> None:
        """Takes what happened, or happens within the time; who `waits_for_room` needs no error."""
        for event in self._session.poll(timeout_s):
            try:
                self._take(event)
            except DiskFullError:
                if not waits_for_room:
                    raise
                self._room.ran_full(self._clock())

    def ask(self, kind: type[Event], request: Callable[[], None]) -> None:
        """Asks the session for something that depends on nobody else, and waits for it.

        Raises:
            DownloadError: it did not answer within `ANSWER_S`.
        """
        self.poll(0.0)
        self.forget(kind)
        request()
        self.wait(lambda: self.has(kind))

    def wait(self, is_answered: Callable[[], bool]) -> None:
        """Waits for what an earlier request brings.

        Raises:
            DownloadError: it did not come within `ANSWER_S`.
        """
        deadline_s = self._clock() + ANSWER_S
        while not is_answered():
            self.poll()
            if self._clock() > deadline_s:
                raise DownloadError(
                    f"the disk did not take the download within {ANSWER_S:.0f} s: is it stuck?"
                )

    def address(self, host: str | None) -> Address | None:
        """Where the session listens on this IP address, or anywhere; None if it does not."""

        def matching() -> Address | None:
            found = [address for address in self._listens if host in (None, address[0])]
            return found[0] if found else None

        deadline_s = self._clock() + FRESH_S
        while matching() is None and self._clock() < deadline_s:
            self.poll()
        return matching()

    def _take(self, event: Event) -> None:
        self._seen.add(type(event))
        self._contacts.note(event)
        self._caution.note(event)
        if isinstance(event, MetadataArrived):
            self.metadata = event.info
        elif isinstance(event, PeerBanned):
            self._meter.note_ban(shown(event.address))
        elif isinstance(event, Listening):
            self._listens.append(event.address)
        elif isinstance(event, Flushed):
            self._write_out.flushed(has_failed=self._room.has_failed)
        elif isinstance(event, BadPiece):
            self.bad_pieces.add(event.piece)
        elif isinstance(event, ResumeData) and event.data:
            self._on_resume_data(event.data)
        elif isinstance(event, StorageFailed):
            where = f" at {Path(event.path).name}" if event.path else ""
            if event.is_full:
                raise DiskFullError(
                    f"the disk is full{where}; what arrived is kept: make room and run it again"
                )
            raise DownloadError(
                f"the disk failed{where}: {event.reason}; what arrived is kept: run it again"
            )
