"""The files of one torrent in the store: fetching what is missing, and knowing what is there.

A piece counts as there when libtorrent has hashed it. While a download runs, the store's record of
that is renewed about once a second, so that a run that is killed costs the next one little: see
`recording` and `remains`.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Final

from ...errors import DownloadError, MagnetarError
from ..division import Standing
from ..ownership import Member, Role
from ..progress import Phase
from ..waves import Waves
from .connection import Connection
from .contacts import shown
from .holding import Holding
from .lending import Lender, borrower_role
from .magnet import split_peer
from .mending import CalledAwayError, Mending
from .recording import Recording
from .session import TorrentJob, TorrentStatus, pieces_of
from .sharing import Sharing
from .swarm import Swarm

ASK_S: Final = 1.0

logger = logging.getLogger(__name__)


class Download:
    """One torrent and its place in the store. Blocking; one thread; `close` in the end."""

    def __init__(self, holding: Holding, connection: Connection) -> None:
        self._holding = holding
        self._connection = connection
        connection.on_resume_data = holding.place.save_resume_data
        self._recording = Recording(holding)
        connection.on_readable = self._recording.written
        self.arrival = self._recording.arrival
        """What may be read of the files."""
        self._sharing = Sharing()
        self._mending = Mending()
        self._lenders: tuple[Lender, ...] = ()
        self._is_divided = False
        self._is_open = False
        self._has_joined = False
        self._address = ""
        self.hashed_bytes = 0
        """Bytes that were read back from the disk to check their pieces."""

    def borrow(self, lenders: Iterable[Lender]) -> None:
        """Asks these for what they hold before anybody outside; before all else."""
        self._lenders = tuple(lenders)

    def count(self) -> None:
        """Makes the connection's counts exact; takes over a second after `join`."""
        if self._connection.is_started and self._has_joined:
            self._connection.swarm().count()

    def tend(self) -> None:
        """Keeps a session in order that has nothing to do; now and then, between other methods."""
        if self._connection.is_started:
            self._connection.swarm().tend()

    def fetch_pieces(self, needed: set[int]) -> set[int]:
        """Fetches these pieces and no others; returns all that may be read from the files."""
        swarm = self._open()
        missing = self._recording.missing(needed)
        if missing:
            self._recording.begin_writing()
        status = self._bring(
            swarm,
            Waves.of(needed),
            urgent=tuple(sorted(missing)),
            phase="plan",
            doing="the pieces that say what the model is",
        )
        self._recording.have = tuple(status.have)
        return set(self._recording.pieces)

    def complete(self, *, phase: Phase = "download") -> None:
        """Fetches what is missing of what is wanted, and records that it is right."""
        holding = self._holding
        if holding.is_intact() and not (self._is_open and self._sharing.owes(self._recording.have)):
            self.arrival.tell(holding.verified())
            return
        swarm = self._open()
        if self._recording.is_done and not holding.is_on_record():
            swarm = self._look_again()  # Somebody changed a file behind libtorrent's back.
        self._recording.tell()
        waves = holding.waves()
        self._recording.begin_writing()
        swarm.is_called_away = lambda: self._mending.is_asked
        self._mending.open()
        try:
            while True:
                try:
                    status = self._bring(swarm, waves, phase=phase, doing=holding.metainfo.name)
                    break
                except CalledAwayError:
                    swarm = self._look_at_asked(swarm)
        finally:
            self._mending.close()
        self._recording.have = tuple(status.have)
        swarm.save_resume_data()
        self._recording.complete()

    def join(self) -> str:
        """Opens the torrent for partners, even where nothing is missing; ``HOST:PORT`` for them.

        Nobody outside is asked any more, before there is a role that needs it.

        Raises:
            DownloadError: no partner could connect.
        """
        swarm = self._connection.swarm()
        swarm.reach_out(False)
        self._open()
        lan_address = self._connection.sources.lan_address
        address = swarm.address(lan_address)
        if address is None:
            raise DownloadError(
                f"the torrent session does not listen on {lan_address}: is that an address "
                "of this node?"
            )
        self._has_joined = True
        self._address = shown(address)
        return self._address

    def share(self, role: Role) -> None:
        """Divides the work with partners from now on; after `join`, for any thread.

        Also in the middle of `complete`. After it, `complete` brings what the role owes.
        """
        self._is_divided = True
        # One of two calls the other: a second connection would be closed, and tried again.
        called = [each for each in role.partners if each in role.called or self._address < each]
        swarm = self._connection.swarm()
        swarm.meter.know(split_peer(partner)[0] for partner in role.partners)
        swarm.join(tuple(map(split_peer, called)))
        self._sharing.give(role)

    def member(self, host: str) -> Member:
        """What this node wants and has at the moment; after `join`, for any thread."""
        swarm = self._connection.swarm()
        have = swarm.have() or self._recording.have
        held = pieces_of(have)
        return Member(
            host=host,
            address=self._address,
            wanted=self._holding.wanted(),
            held=held,
            begun=swarm.begun(),
            has_way_out=self._connection.has_way_out(),
            order=self._holding.waves(),
            room=self._holding.spare_pieces(held),
        )

    def lend(self, host: str, to: Iterable[str]) -> Lender | None:
        """What is here and coming, for nodes with these IP addresses; after `join`, any thread.

        None before there is a role.
        """
        swarm = self._connection.swarm()
        have = swarm.have() or self._recording.have
        if not (self._is_divided and have):
            return None
        swarm.admit(to)
        return Lender(
            host=host,
            address=self._address,
            torrent=self._holding.metainfo.raw,
            held=pieces_of(have),
            coming=self._sharing.coming(have),
        )

    def standing(self) -> Standing:
        """How far the role is; after `join`, for any thread."""
        swarm = self._connection.swarm()
        return self._sharing.standing(
            swarm.have() or self._recording.have, swarm.meter.received_bytes
        )

    def recheck(self) -> bool:
        """Hashes all files against the pieces; whether any piece was bad. `complete` mends it."""
        swarm = self._open()
        before = self._recording.have
        # Until the check is over nothing is known, and an end before that must leave no claim.
        self._recording.forget()
        self._is_open = False
        self.hashed_bytes += self._holding.file_bytes()
        self._recording.have = tuple(swarm.recheck().have)
        self._is_open = True
        self._recording.tell()
        if self._recording.have == before:
            self._recording.remember(done=self._recording.is_done)
            return False
        self._warn_of_damage(before)
        self._recording.is_done = False
        return True

    def mend(self, pieces: frozenset[int]) -> None:
        """Hashes these pieces on the disk again, and fetches those anew that are not right."""
        holding = self._holding
        check = holding.piece_check()
        if not check.has_sums:
            if self.recheck():
                self.complete(phase="verify")
            return
        bad = {piece for piece in sorted(pieces) if not check.is_right(piece)}
        self.hashed_bytes += check.hashed_bytes
        if bad:
            self._open()
            self._take_out(bad)
            self.complete(phase="verify")

    def mend_meanwhile(self, pieces: frozenset[int]) -> bool:
        """The same while another thread is in `complete`; False: there is none, or not any more."""
        if not self._holding.piece_check().has_sums:
            return False
        ask = self._mending.ask(pieces)
        if ask is None:
            return False
        ask.looked.wait()
        while not self.arrival.wait(pieces, ASK_S):
            if not self._mending.is_open:
                return False
        return True

    def _look_at_asked(self, swarm: Swarm) -> Swarm:
        """Hashes the pieces that somebody found damaged; those that are count as missing."""
        asks = self._mending.take()
        try:
            check = self._holding.piece_check()
            asked = frozenset().union(*(ask.pieces for ask in asks))
            self._recording.have = swarm.verified() or self._recording.have
            bad = {p for p in sorted(asked) if self._recording.have[p] and not check.is_right(p)}
            self.hashed_bytes += check.hashed_bytes
            if bad:
                swarm = self._take_out(bad)
                self._recording.begin_writing()
            return swarm
        finally:
            for ask in asks:
                ask.looked.set()

    def _take_out(self, bad: set[int]) -> Swarm:
        """Lets these pieces count as missing, in a torrent that is begun anew."""
        logger.warning("%s: %d damaged pieces on the disk", self._holding.metainfo.name, len(bad))
        swarm = self._connection.swarm()
        swarm.save_resume_data()
        swarm.remove()
        self._is_open = False
        # What was in a write queue is in the files now.
        self._recording.take_out(bad)
        return self._open()

    def close(self) -> None:
        """Keeps resume data and takes the torrent out of the session."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._keep_state(self._connection.swarm())
        except MagnetarError as error:
            # Often the very disk error that ended the download, which is what the user should see.
            logger.warning("what is on disk will be hashed again next time: %s", error)

    def _open(self) -> Swarm:
        """The torrent in a session, with what is on disk known, and nothing wanted at first."""
        swarm = self._connection.swarm()
        if self._is_open:
            return swarm
        if self._lenders:
            # Nobody outside need hear of us before something is wanted from there.
            swarm.reach_out(False)
            swarm.only(split_peer(lender.address)[0] for lender in self._lenders)
        holding = self._holding
        holding.place.data.mkdir(parents=True, exist_ok=True)
        self._recording.restart()
        remains = holding.remains()
        if remains is None:
            self.hashed_bytes += holding.file_bytes()
        else:
            self.hashed_bytes += holding.piece_map.num_bytes(remains.whole)
        status = swarm.add(
            TorrentJob(
                info_hash=holding.place.info_hash,
                save_path=holding.place.data,
                metainfo=holding.metainfo,
                trackers=self._connection.sources.trackers,
                web_seeds=self._connection.sources.web_seeds,
                peers=self._connection.addresses,
                piece_priorities=[0] * holding.metainfo.num_pieces,
                unwanted=frozenset(holding.selection.surplus),
                known=None if remains is None else remains.known,
                found={} if remains is None else remains.found,
                begun=() if remains is None else remains.begun,
                resume=holding.place.resume_data(),
            )
        )
        self._is_open = True
        self._recording.have = tuple(status.have)
        lending = tuple(split_peer(lender.address) for lender in self._lenders)
        swarm.meter.know(host for host, _ in lending)
        swarm.join(lending)
        return swarm

    def _look_again(self) -> Swarm:
        """Opens the torrent anew: files that changed meanwhile are hashed, and no others."""
        before = self._recording.have
        swarm = self._connection.swarm()
        swarm.remove()
        self._is_open = False
        self.arrival.tell(frozenset())
        swarm = self._open()
        self._warn_of_damage(before)
        return swarm

    def _warn_of_damage(self, before: Sequence[bool]) -> None:
        num_bad = sum(
            was and not now for was, now in zip(before, self._recording.have, strict=True)
        )
        if num_bad:
            name = self._holding.metainfo.name
            logger.warning("%s: %d damaged pieces on the disk", name, num_bad)

    def _bring(
        self,
        swarm: Swarm,
        waves: Waves,
        *,
        urgent: tuple[int, ...] = (),
        phase: Phase,
        doing: str,
    ) -> TorrentStatus:
        """Fetches the waves, by the role if there is one, and first from whoever lends."""
        if not self._is_divided:
            missing = self._recording.missing(waves.pieces)
            self._sharing.give(borrower_role(self._lenders, missing))
        status = self._sharing.fetch(
            swarm, waves, phase=phase, doing=doing, timeout_s=self._connection.timeout_s
        )
        if status is None:
            self._ask_everybody(swarm)
            status = swarm.fetch(waves, urgent=urgent, phase=phase, doing=doing)
        return status

    def _ask_everybody(self, swarm: Swarm) -> None:
        swarm.reach_out(True)
        swarm.only(None)

    def _keep_state(self, swarm: Swarm) -> None:
        recording = self._recording
        if not recording.is_done:
            have = swarm.verified()
            swarm.flush()
            swarm.save_resume_data()
            recording.have = have or recording.have
        swarm.remove()
        # Only now can no write come any more that would change a fingerprint.
        recording.finish()
