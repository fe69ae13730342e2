"""Giving what a store holds of a release to named hosts, and to nobody else.

A release that is on a disk of the cluster need not cross the network outside again. Whoever holds
it opens it when it is asked for: a small session that wants nothing, announces nothing and lets
nobody in who did not ask through the cluster.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ...errors import PortInUseError
from ..layout import select_files
from ..ownership import Member, Role
from ..store import ReleaseFolder
from .contacts import shown
from .events import Checked, StorageFailed
from .holding import Holding
from .libtorrent_session import LibtorrentSession
from .session import SessionSettings, TorrentJob, TorrentSession, listening_address, pieces_of
from .traffic import Traffic, TrafficLog

POLL_S: Final = 1.0
CHECK_S: Final = 10.0
"""What is on the disk is on record; a check that takes longer hashes files, and is given up."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lender:
    """A node that gives what it holds of a release and asks for nothing."""

    host: str
    address: str
    """``HOST:PORT`` where it waits for those whom it lets in; it calls nobody."""
    torrent: bytes
    """The .torrent."""
    held: frozenset[int]
    """Pieces on its disk, verified."""
    coming: frozenset[int] = frozenset()
    """Pieces that it is just bringing from outside."""

    @property
    def pieces(self) -> frozenset[int]:
        """Those that need not be asked for outside."""
        return self.held | self.coming

    def member(self) -> Member:
        """As a part of a cluster that fetches together, under its address."""
        return Member(
            host=self.address,
            address=self.address,
            wanted=frozenset(),
            held=self.pieces,
            has_way_out=False,
            calls_nobody=True,
        )


def borrower_role(lenders: Sequence[Lender], missing: frozenset[int]) -> Role | None:
    """That of a node alone: what is lent is borrowed, the rest comes from outside.

    None where nobody lends anything of what is missing.
    """
    lent = frozenset().union(*(lender.pieces for lender in lenders))
    if not missing & lent:
        return None
    return Role(
        owned=missing - lent,
        lent=frozenset(),
        borrowed=missing & lent,
        ready=missing & lent,
        partners=tuple(lender.address for lender in lenders),
        called=frozenset(lender.address for lender in lenders),
    )


class Lending:
    """Gives what is verified of a release in a store, from `open` to `close`; for any thread.

    The release is not locked by it: others may go on fetching into it meanwhile.
    """

    def __init__(self, session: TorrentSession, holding: Holding, lender: Lender) -> None:
        self.lender = lender
        self._session = session
        self._holding = holding
        self._admitted: set[str] = set()
        self._has_ended = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._traffic = TrafficLog()
        self._thread = threading.Thread(target=self._serve, name="lending")
        self._thread.start()

    @classmethod
    def open(
        cls,
        place: ReleaseFolder,
        *,
        host: str,
        address: str,
        session_factory: Callable[[SessionSettings], TorrentSession] = LibtorrentSession,
        clock: Callable[[], float] = time.monotonic,
    ) -> "Lending | None":
        """A session on this IP address of the node `host`; None where nothing can be given."""
        metainfo, resume = place.metainfo(), place.resume_data()
        if metainfo is None or resume is None:
            return None
        selection = select_files({file.path: file.length for file in metainfo.files})
        holding = Holding(place, metainfo, selection)
        place.use()
        if not (verified := holding.verified()):
            place.end_use()
            return None
        session = session_factory(
            SessionSettings(
                listen=shown((address, 0)),
                utp=False,
                dht=False,
                seeks=False,
                leaves_by=address,
                pex=False,
                upload_bytes_per_s=0,
                is_small=True,
            )
        )
        try:
            session.only(())
            session.reach_out(False)
            port = listening_address(session)[1]
            session.add(
                TorrentJob(
                    info_hash=place.info_hash,
                    save_path=place.data,
                    metainfo=metainfo,
                    piece_priorities=[0] * metainfo.num_pieces,
                    unwanted=frozenset(selection.surplus),
                    known=verified,
                    resume=resume,
                )
            )
            held = verified & _checked(session, clock)
        except PortInUseError as error:
            logger.warning("%s is not shared with later deployments: %s", metainfo.name, error)
            held = frozenset()
        if not held:
            session.close()
            place.end_use()
            return None
        lender = Lender(host=host, address=shown((address, port)), torrent=metainfo.raw, held=held)
        return cls(session, holding, lender)

    @property
    def sent_bytes(self) -> int:
        """Payload given so far, as read about a second ago."""
        status = self._session.status()
        return status.uploaded_bytes if status is not None else 0

    @property
    def traffic(self) -> Traffic:
        """By peer and in all, as read about a second ago."""
        return self._traffic.reading(received_bytes=0, sent_bytes=self.sent_bytes)

    def is_current(self) -> bool:
        """Whether it still gives, and the store has verified no more since it was opened."""
        return not self._has_ended and self._holding.verified() <= self.lender.held

    def admit(self, hosts: Iterable[str]) -> None:
        """Lets in whoever comes from these IP addresses, besides those let in before."""
        with self._lock:
            if (new := set(hosts) - self._admitted) and not self._has_ended:
                self._admitted |= new
                self._session.only(sorted(self._admitted))

    def close(self) -> None:
        """Ends the session; may be called twice."""
        self._over.set()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while not self._over.is_set():
                for event in self._session.poll(POLL_S):
                    if isinstance(event, StorageFailed):
                        name = self._holding.metainfo.name
                        logger.warning("%s is shared no more: %s", name, event.reason)
                        return
                self._traffic.note(self._session.peers(), self._admitted)
        finally:
            with self._lock:
                self._has_ended = True
                self._session.close()
            self._holding.place.end_use()


def _checked(session: TorrentSession, clock: Callable[[], float]) -> frozenset[int]:
    """The pieces that the session takes for whole; none where it would have to hash them."""
    until_s, was_checked = clock() + CHECK_S, False
    while clock() < until_s:
        was_checked |= any(isinstance(event, Checked) for event in session.poll(0.1))
        status = session.status()
        if was_checked and status is not None and status.state == "active":
            return pieces_of(status.have)
    return frozenset()
