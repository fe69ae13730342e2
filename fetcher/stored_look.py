"""What a release is, from what a store holds of it, whoever works on it meanwhile."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ReleaseHints
from .layout import select_files
from .piece_map import PieceMap
from .store import ReleaseFolder
from .tensors import MissingRangeError
from .torrent.holding import Holding
from .torrent.pieces import PieceReader
from .torrent.remains import boot_id

if TYPE_CHECKING:
    from .checkpoint.release import ReleaseFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLook:
    """What describes a release."""

    facts: "ReleaseFacts"
    sizes: dict[str, int]
    """As `Fetch.sizes`."""
    piece_map: PieceMap


def look_stored(
    place: ReleaseFolder, *, given: ReleaseHints, known: ReleaseHints
) -> StoredLook | None:
    """Read it without locking the release; None where something that describes it is not there.

    Pieces count that have their hashes now, or are on record where that cannot be known.

    Raises:
        What `read_release` raises about the release.
    """
    from .checkpoint.release import read_release

    metainfo = place.metainfo()
    if metainfo is None:
        return None
    selection = select_files({file.path: file.length for file in metainfo.files})
    place.refuse_escape(selection.wanted)
    holding = Holding(place, metainfo, selection)
    check, record = holding.piece_check(), place.record.read()
    # Of files that are being written, nobody can say by their times who does it.
    verified = record.lasting(boot_id()) if record.is_writing else holding.verified()
    reader = PieceReader(
        metainfo=metainfo, data=place.data, root=selection.root, wanted=selection.wanted
    )

    def is_there(piece: int) -> bool:
        found = check.look_at(piece)
        return piece in verified if found is None else found

    needed = holding.first_look()
    while all(map(is_there, needed)):
        reader.mark_readable(needed)
        try:
            facts = read_release(reader, given=given, known=known)
        except MissingRangeError as missing:
            file = reader.file(missing.file)
            more = set(metainfo.pieces(file, missing.offset, missing.num_bytes)) - needed
            if not more:
                return None
            needed |= more
            continue
        sizes = {
            path.removeprefix(selection.root): metainfo.file(path).length
            for path in selection.wanted
        }
        return StoredLook(facts=facts, sizes=sizes, piece_map=holding.piece_map)
    return None
