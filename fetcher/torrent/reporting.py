"""What a person hears of one torrent: how far it is, what it waits for, and why it gave up."""

from typing import Final

from ...errors import TimedOutError
from ..progress import NUM_PARTS, Phase, Progress, ProgressSink
from ..waves import Waves
from .contacts import Contacts
from .metainfo import Metainfo
from .meter import Meter
from .session import TorrentSession, TorrentStatus

STALL_S: Final = 5.0
"""After so long without news it says what is the matter."""


class Reporting:
    """Turns the latest reading of a session into `Progress` and messages. One thread."""

    def __init__(
        self,
        session: TorrentSession,
        *,
        contacts: Contacts,
        meter: Meter,
        on_progress: ProgressSink,
        node: str,
    ) -> None:
        self._session = session
        self._contacts = contacts
        self._meter = meter
        self._on_progress = on_progress
        self._node = node
        self._metainfo: Metainfo | None = None
        self._waves = Waves(())
        self._whole: Waves | None = None
        self.hashing: tuple[int, int] | None = None
        """While what is on disk is not known: bytes that were hashed by the way, and of how many
        an outcome is waited for."""

    def restart(self, metainfo: Metainfo | None) -> None:
        """Another torrent, of which nothing is asked yet."""
        self._metainfo = metainfo
        self.ask(Waves(()))

    def ask(self, waves: Waves, whole: Waves | None = None) -> None:
        """The session wants these pieces from now on; progress is told of `whole`, if given."""
        self._waves, self._whole = waves, whole

    def tell_wait(self, phase: Phase, doing: str, idle_s: float) -> None:
        """Says what is done; after `idle_s` seconds without news, or of metadata, the cause."""
        status = self._session.status()
        is_idle = idle_s >= STALL_S
        if is_idle or (status is not None and status.state == "metadata"):
            doing = self._contacts.waiting_for(status, self._session.peers())
            if is_idle:
                doing += f"; nothing for {idle_s:.0f} s"
        self.tell(phase, doing, is_idle=is_idle)

    def tell(
        self, phase: Phase, message: str, *, is_paused: bool = False, is_idle: bool = False
    ) -> None:
        """Hands the latest reading to the sink, at no rate while it is paused or idle."""
        status = self._session.status() or TorrentStatus()
        done, total = status.wanted_done_bytes, status.wanted_bytes
        # libtorrent's is a mean, which takes a minute to come to nothing.
        rate = 0.0 if is_paused or is_idle else status.rate_bytes_per_s
        parts: tuple[float, ...] = ()
        if status.state == "checking":
            # The reading counts what was found good; a person waits for what was looked at.
            done, rate = int(status.checked * total), 0.0
        elif self.hashing is not None:
            done, total = self.hashing
        elif status.have and self._metainfo is not None:
            whole = self._whole or self._waves
            parts = whole.parts(status.have, NUM_PARTS)
            if self._whole is not None:
                # The session wants a part of it at the moment. Pieces are counted as whole.
                length, pieces = self._metainfo.piece_length, whole.pieces
                total = length * len(pieces)
                done = length * sum(status.have[piece] for piece in pieces)
        self._on_progress(
            Progress(
                phase=phase,
                done_bytes=done,
                total_bytes=total,
                rate_bytes_per_s=rate,
                lan_bytes_per_s=min(rate, self._meter.lan_bytes_per_s),
                message=message,
                node=self._node,
                parts=parts,
                is_paused=is_paused,
            )
        )

    def timed_out(self, doing: str, timeout_s: float) -> TimedOutError:
        """The error for whoever waited so long: the cause, who was asked, and what to do."""
        cause = self._contacts.waiting_for(
            self._session.status(), self._session.peers(), with_error=False
        )
        # Of a private torrent peers send none.
        private = "; a private torrent needs its .torrent file" if doing == "metadata" else ""
        return TimedOutError(
            f"{doing}: nothing arrived within {timeout_s:g} s: {cause}; "
            f"{self._contacts.asked()}. Name a peer that has it with --peer HOST:PORT, "
            f"or wait longer with --timeout{private}"
        )
