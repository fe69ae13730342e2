"""Hashing what a store holds of a release, without asking anybody."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import MagnetarError, NotFoundError
from ..layout import select_files
from ..piece_map import ByteRange
from ..progress import Progress, ProgressSink
from ..store import ReleaseFolder
from ..tensors import MissingRangeError
from .contacts import Contacts
from .holding import Holding
from .libtorrent_session import LibtorrentSession
from .pieces import PieceReader
from .session import SessionSettings, TorrentJob, TorrentSession
from .swarm import Swarm

OFFLINE = SessionSettings(listen="127.0.0.1:0", utp=False, dht=False, seeks=False, pex=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheck:
    """What a check of one release found."""

    info_hash: str
    name: str
    num_pieces: int
    """Pieces that were to be there: those on record, or where nothing is, those with data."""
    num_bytes: int
    damaged_pieces: tuple[int, ...]
    damaged: tuple[ByteRange, ...]
    """Where they lie in the files."""
    damaged_tensors: tuple[str, ...]
    """The tensors in them; empty as well where the release's index cannot be read any more."""

    @property
    def is_right(self) -> bool:
        """Whether every piece has its hash."""
        return not self.damaged_pieces


def check_stored(
    place: ReleaseFolder,
    *,
    on_progress: ProgressSink,
    stop: threading.Event,
    session_factory: Callable[[SessionSettings], TorrentSession] = LibtorrentSession,
) -> StoredCheck:
    """Reads and hashes all pieces that are on record; bad ones are taken off it.

    So the next fetch brings those, and no others.

    Raises:
        NotFoundError: the store does not hold it. PreflightError: a process works on it.
        InterruptedByUserError: stopped; the record is as before.
    """
    metainfo = place.metainfo()
    if metainfo is None:
        raise NotFoundError(f"{place.root} holds no release: magnetar store ls lists those there")
    place.lock()
    try:
        selection = select_files({file.path: file.length for file in metainfo.files})
        holding = Holding(place, metainfo, selection)
        expected = place.record.read().pieces
        found = holding.blocks_of(expected or frozenset(range(metainfo.num_pieces)))
        swarm = Swarm(
            session=session_factory(OFFLINE),
            contacts=Contacts(trackers=(), peers=(), dht=False),
            named_peers=(),
            timeout_s=None,
            on_progress=on_progress,
            on_resume_data=lambda data: None,
            on_readable=lambda have: None,
            stop=stop,
            node="",
        )
        whole = {piece for piece, blocks in found.items() if all(blocks)}
        try:
            status = swarm.add(
                TorrentJob(
                    info_hash=place.info_hash,
                    save_path=place.data,
                    metainfo=metainfo,
                    piece_priorities=[0] * metainfo.num_pieces,
                    unwanted=frozenset(selection.surplus),
                    known=(),
                    found={piece: found[piece] for piece in whole},
                    resume=place.resume_data(),
                )
            )
            swarm.remove()
        finally:
            swarm.close()
        num_bytes = holding.piece_map.num_bytes(expected or whole)
        on_progress(
            Progress(
                phase="verify",
                done_bytes=num_bytes,
                total_bytes=num_bytes,
                message=metainfo.name,
                finished=True,
            )
        )
        right = frozenset(piece for piece in whole if status.have[piece])
        damaged = tuple(sorted((expected or whole) - right))
        holding.remember(right, done=True, synced=holding.synced())
        reader = PieceReader(
            metainfo=metainfo, data=place.data, root=selection.root, wanted=selection.wanted
        )
        reader.mark_readable(right)
        return StoredCheck(
            info_hash=place.info_hash,
            name=metainfo.name,
            num_pieces=len(expected or whole),
            num_bytes=num_bytes,
            damaged_pieces=damaged,
            damaged=holding.piece_map.readable(damaged),
            damaged_tensors=_tensors(holding, reader, frozenset(damaged)),
        )
    finally:
        place.unlock()


def _tensors(holding: Holding, reader: PieceReader, damaged: frozenset[int]) -> tuple[str, ...]:
    """Named as the files do."""
    from ..checkpoint.release import stored_tensors

    if not damaged:
        return ()
    try:
        stored = stored_tensors(reader)
    except (MagnetarError, MissingRangeError):
        return ()  # The damage, or what was never fetched, hides which tensors there are.
    return tuple(
        entry.name
        for entry in stored
        if not damaged.isdisjoint(
            holding.piece_map.pieces_of(ByteRange(entry.file, entry.offset, entry.num_bytes))
        )
    )
