"""One torrent moving: waiting for it, having it told of, and giving up when nothing comes."""

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...errors import DiskFullError, InterruptedByUserError
from ..progress import Phase, ProgressSink
from ..waves import Waves
from .addresses import Address
from .answers import Answers
from .caution import Caution
from .contacts import Contacts
from .events import Checked, Flushed, Removed, ResumeData
from .mending import CalledAwayError
from .meter import Meter
from .reporting import Reporting
from .room_watch import RoomWatch
from .session import TorrentJob, TorrentSession, TorrentStatus
from .write_out import WriteOut

REPORT_S = 0.25
RECONNECT_S = 2.0
RESUME_S = 30.0
COUNT_S = 1.5
HASH_S = 10.0
"""Without an outcome for so long, found pieces wait for hashes that only others have."""


class StalledError(Exception):
    """Nothing arrives; for whoever can ask somebody else, never for a user."""


class Swarm:
    """A `TorrentSession` with its owner's patience. Methods block; called from one thread."""

    def __init__(
        self,
        *,
        session: TorrentSession,
        contacts: Contacts,
        named_peers: tuple[Address, ...],
        timeout_s: float | None,
        on_progress: ProgressSink,
        on_resume_data: Callable[[bytes], None],
        on_readable: Callable[[Sequence[bool]], None],
        stop: threading.Event,
        node: str,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._session = session
        self._named_peers = named_peers
        self._timeout_s = timeout_s
        self._on_readable = on_readable
        self._write_out = WriteOut(session, on_readable)
        self._stop = stop
        self._clock = clock
        self._room = RoomWatch(session, now_s=clock(), free_bytes=free_bytes)
        self._caution = Caution(session, clock())
        self._job: TorrentJob | None = None
        self._door = threading.Lock()
        self._only: frozenset[str] | None = None
        self._admitted: frozenset[str] = frozenset()
        self._reconnected_s = clock()
        self._resumed_s = clock()
        self._is_checking = False
        self._has_files = False
        self.meter = Meter(session, clock)
        """What went over the network."""
        self._answers = Answers(
            session,
            contacts=contacts,
            meter=self.meter,
            room=self._room,
            caution=self._caution,
            write_out=self._write_out,
            on_resume_data=on_resume_data,
            clock=clock,
        )
        self._reporting = Reporting(
            session,
            contacts=contacts,
            meter=self.meter,
            on_progress=on_progress,
            node=node,
        )
        self.is_called_away: Callable[[], bool] = lambda: False
        """Whether `fetch` is to be left, to be called anew soon."""

    def tend(self) -> None:
        """Takes what happened while nothing was waited for; within a minute at the least.

        Raises:
            DownloadError: the disk failed.
        """
        self._answers.poll(0.0)
        self.meter.look()

    def count(self) -> None:
        """Takes readings for so long that `meter` is right.

        libtorrent adds up the amounts of its peers once a second.
        """
        until_s = self._clock() + COUNT_S
        while self._clock() < until_s:
            self._answers.poll()
        self.meter.look()

    def address(self, host: str | None) -> Address | None:
        """Where the session listens on this IP address, or anywhere; None if it does not."""
        return self._answers.address(host)

    def join(self, partners: tuple[Address, ...]) -> None:
        """Stays connected with these peers besides the named ones. For any thread."""
        self._named_peers = tuple(dict.fromkeys(self._named_peers + partners))
        self._session.connect(partners)

    def only(self, hosts: Iterable[str] | None) -> None:
        """See `TorrentSession.only`; who is let in again is asked at once."""
        self.meter.look()  # Some are gone after it.
        with self._door:
            self._only = None if hosts is None else frozenset(hosts)
            self._session.only(self._let_in())
        self._session.connect(self._named_peers)

    def admit(self, hosts: Iterable[str]) -> None:
        """Lets nodes with these IP addresses in, whatever `only` says. For any thread."""
        with self._door:
            if new := frozenset(hosts) - self._admitted:
                self._admitted |= new
                self.meter.know(new)
                self._session.only(self._let_in())

    def _let_in(self) -> frozenset[str] | None:
        return None if self._only is None else self._only | self._admitted

    def reach_out(self, wanted: bool) -> None:
        """See `TorrentSession.reach_out`."""
        self._session.reach_out(wanted)

    def have(self) -> Sequence[bool]:
        """By piece, whether it has the right hash, at the last reading; for any thread."""
        status = self._session.status()
        return status.have if status is not None and not self._is_checking else ()

    def begun(self) -> frozenset[int]:
        """Pieces of which only a part is there; for any thread."""
        return self._session.begun()

    def fetch_metadata(self, job: TorrentJob) -> bytes:
        """Adds a torrent known by its hash only, waits for the info dictionary, removes it again.

        Raises:
            TimedOutError: it did not come in time. InterruptedByUserError: `stop` was set.
        """
        self._session.add(job)
        self._wait(lambda: self._answers.metadata is not None, phase="metadata", doing="metadata")
        self.remove()
        assert self._answers.metadata is not None
        return self._answers.metadata

    def add(self, job: TorrentJob) -> TorrentStatus:
        """Adds a torrent and waits until what is on disk is known."""
        self._job = job
        self._reporting.restart(job.metainfo)
        self._answers.forget(Checked)
        self._write_out.restart()
        self._caution.restart()
        self._session.add(job)
        found = {piece for piece, blocks in job.found.items() if all(blocks)}
        return self._checked(found, 0 if job.metainfo is None else job.metainfo.piece_length)

    def recheck(self) -> TorrentStatus:
        """Hashes what is on disk again."""
        self._answers.forget(Checked)
        self._session.recheck()
        return self._checked(set(), 0)

    def fetch(
        self,
        waves: Waves,
        *,
        whole: Waves | None = None,
        urgent: tuple[int, ...] = (),
        phase: Phase,
        doing: str,
        gives_up: Callable[[float], bool] | None = None,
    ) -> TorrentStatus:
        """Waits until every piece of the waves is verified and in the files; no other is wanted.

        Meanwhile `on_readable` hears of those that are. `whole` is what progress is told of, where
        these waves are only a part of it.

        While the disk is short of room it says so and waits for that too.

        Raises:
            StalledError: `gives_up` said so, asked with the seconds in which nothing arrived.
            CalledAwayError: `is_called_away` said so.
            TimedOutError: nothing arrived for the time of the constructor. DownloadError: the disk
            failed. InterruptedByUserError: `stop` was set.
        """
        front = -1
        self._reporting.ask(waves, whole)

        def is_there() -> bool:
            nonlocal front
            have = self.verified()
            if not have:
                return False
            if self.is_called_away():
                raise CalledAwayError
            if (now := waves.front(have)) != front:
                front = now
                self._session.prioritize(waves.priorities(front, len(have)))
                if urgent:
                    self._session.urge(piece for piece in urgent if not have[piece])
            status = self._session.status()
            assert status is not None
            self._write_out.keep_up(status, self._clock())
            return front == len(waves.waves)

        while True:
            self._wait(is_there, phase=phase, doing=doing, gives_up=gives_up)
            self._reporting.tell(phase, doing)
            status = self._session.status()
            assert status is not None
            try:
                self.flush()
            except DiskFullError:
                self._room.ran_full(self._clock())
                continue
            self._on_readable(status.have)
            return status

    def verified(self) -> tuple[bool, ...]:
        """By piece, whether it has the right hash as far as is known; `flush` comes after it."""
        status = self._session.status()
        return tuple(status.have) if status is not None and not self._is_checking else ()

    def flush(self) -> None:
        """Waits until verified pieces are in the files."""
        # The answer to an earlier request says nothing about pieces that came since.
        self._answers.wait(lambda: not self._write_out.is_under_way)
        self._answers.ask(Flushed, self._session.flush)

    def save_resume_data(self) -> None:
        """Has resume data made and handed to `on_resume_data`."""
        self._answers.ask(ResumeData, self._session.request_resume_data)

    def remove(self) -> None:
        """Takes the torrent out of the session; its files are then closed."""
        self.meter.close_torrent()
        self._has_files = False
        self._answers.ask(Removed, self._session.remove)

    def close(self) -> None:
        """Ends the session."""
        self._session.close()

    def _checked(self, found: set[int], piece_length: int) -> TorrentStatus:
        """Waits until it is known what is on disk: `found` pieces are hashed by the way."""
        self._is_checking = True
        self._answers.bad_pieces.clear()
        num_left, moved_s = len(found), self._clock()
        self._reporting.hashing = 0, 0

        def is_checked() -> bool:
            nonlocal num_left, moved_s
            status = self._session.status()
            if not self._answers.has(Checked) or status is None or status.state != "active":
                moved_s = self._clock()
                return False
            left = {piece for piece in found - self._answers.bad_pieces if not status.have[piece]}
            if len(left) != num_left:
                num_left, moved_s = len(left), self._clock()
            num_hashed = len(found) - num_left
            self._reporting.hashing = num_hashed * piece_length, len(found) * piece_length
            return not left or self._clock() - moved_s >= HASH_S

        self._wait(is_checked, phase="verify", doing="the files on disk")
        self._is_checking, self._reporting.hashing = False, None
        self._has_files = True
        status = self._session.status()
        assert status is not None
        return status

    def _wait(
        self,
        is_done: Callable[[], bool],
        *,
        phase: Phase,
        doing: str,
        gives_up: Callable[[float], bool] | None = None,
    ) -> None:
        moved_s = reported_s = self._clock()
        last: object = None
        while True:
            if self._stop.is_set():
                raise InterruptedByUserError("stopped; what arrived is kept")
            self._answers.poll(waits_for_room=self._has_files)
            now_s = self._clock()
            self.meter.keep_up(now_s)
            if self._waits_for_room(phase, now_s):
                moved_s = now_s
                continue
            self._sort_out_liars(now_s)
            if is_done():
                return
            status = self._session.status()
            if (mark := _moving_parts(status)) != last:
                last, moved_s = mark, now_s
            idle_s = now_s - moved_s
            if gives_up is not None and gives_up(idle_s):
                raise StalledError
            if self._timeout_s is not None and idle_s >= self._timeout_s and not self._is_checking:
                raise self._reporting.timed_out(doing, self._timeout_s)
            if now_s - reported_s >= REPORT_S:
                reported_s = now_s
                self._reporting.tell_wait(phase, doing, idle_s)
            self._keep_up(now_s)

    def _waits_for_room(self, phase: Phase, now_s: float) -> bool:
        """Holds the download while the disk is short of room, and lets it go on by itself."""
        status = self._session.status()
        if status is None or self._job is None or self._is_checking or not self._has_files:
            return False
        look = self._room.look(self._job.save_path, status, now_s)
        if look.message:
            self._reporting.tell(phase, look.message, is_paused=True)
        if look.must_recheck:
            self.recheck()
        return look.is_short

    def _sort_out_liars(self, now_s: float) -> None:
        """Begins the torrent anew where honest peers would be blamed for the garbage of others."""
        status = self._session.status()
        if status is None or self._is_checking or not self._has_files:
            return
        if self._caution.look(status, now_s):
            self.flush()
            self.meter.look()
            self._answers.forget(Checked)
            self._session.begin_afresh()
            self._caution.began_afresh()
            self._checked(set(), 0)
            self._session.connect(self._named_peers)

    def _keep_up(self, now_s: float) -> None:
        if self._is_checking:
            return
        if now_s - self._reconnected_s >= RECONNECT_S:
            self._reconnected_s = now_s
            status = self._session.status()
            if status is not None and status.num_peers < len(self._named_peers):
                self._session.connect(self._named_peers)
        if now_s - self._resumed_s >= RESUME_S and self._has_files:
            self._resumed_s = now_s
            self._session.request_resume_data()


def _moving_parts(status: TorrentStatus | None) -> object:
    if status is None:
        return None
    return (status.downloaded_bytes, status.wanted_done_bytes, status.checked, status.state)
