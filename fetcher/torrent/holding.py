"""What of one torrent is wanted, and what of that is known to lie in the store."""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ..layout import Selection
from ..piece_map import PieceMap
from ..record import Record, fingerprints
from ..store import ReleaseFolder
from ..waves import Waves
from .disk_room import RESERVE_BYTES
from .metainfo import Metainfo
from .piece_check import PieceCheck
from .remains import Remains, boot_id, data_runs, found_blocks, survey


class Holding:
    """The wanted files of a torrent and the store's record of them; touches no network.

    The record counts only while every file has the size and time that it had when it was written;
    what counts of it otherwise, `remains` says.
    """

    def __init__(
        self,
        place: ReleaseFolder,
        metainfo: Metainfo,
        selection: Selection,
        *,
        boot: str | None = None,
    ) -> None:
        self.place = place
        self.metainfo = metainfo
        self.selection = selection
        self.piece_map = PieceMap.of_torrent(metainfo, root=selection.root)
        self._boot = boot_id() if boot is None else boot
        self._share: frozenset[int] | None = None
        self._order = Waves(())

    def restrict(self, share: frozenset[int] | None) -> None:
        """Wants only these pieces and the small files' from now on; None wants all files."""
        self._share = share

    def order(self, order: Waves) -> None:
        """Wants these pieces first from now on, as far as they are wanted at all."""
        self._order = order

    def waves(self) -> Waves:
        """What a download brings, in order: the small files are always first."""
        small = self.file_pieces(set(self.selection.wanted) - set(self.selection.weights))
        return Waves.of(small, *self._order.waves).within(self.wanted())

    def wanted(self) -> frozenset[int]:
        """The pieces that a download brings."""
        if self._share is None:
            return self.file_pieces(self.selection.wanted)
        small = set(self.selection.wanted) - set(self.selection.weights)
        return self._share | self.file_pieces(small)

    def is_intact(self) -> bool:
        """All that is wanted was there and right, and no file has changed since."""
        return self.wanted() <= self.verified()

    def matches(self, record: Record) -> bool:
        """Whether the files still look as they did when the record was written."""
        return fingerprints(self.place.data, self.selection.wanted) == dict(record.files)

    def is_on_record(self) -> bool:
        """Whether the files still look as they did when the record was written last."""
        return self.matches(self.place.record.read())

    def verified(self) -> frozenset[int]:
        """Pieces in the files that had the right hashes, as far as that is on record."""
        record = self.place.record.read()
        return record.lasting(self._boot) if self.matches(record) else frozenset()

    def remains(self) -> Remains | None:
        """What lies on the disk, whatever ended the last run; None: nothing is on record."""
        record = self.place.record.read()
        if not record.files and not record.is_writing:
            return None
        return survey(
            self.metainfo,
            self.selection.wanted,
            record,
            fingerprints(self.place.data, self.selection.wanted),
            recorded_ns=self.place.record.written_ns(),
            boot=self._boot,
            has_parts=self._has_parts(),
            data_runs=lambda path: data_runs(self.place.data / path),
        )

    def blocks_of(self, pieces: Collection[int]) -> dict[int, tuple[bool, ...]]:
        """Which blocks of these pieces may be in the files."""
        return found_blocks(
            self.metainfo,
            self.selection.wanted,
            pieces,
            kept_apart=self.place.record.read().pieces if self._has_parts() else frozenset(),
            data_runs=lambda path: data_runs(self.place.data / path),
        )

    def _has_parts(self) -> bool:
        """Whether libtorrent's file of parts is there."""
        return any(self.place.data.glob(".*.parts"))

    def synced(self) -> frozenset[int]:
        """Pieces on record that a power cut would leave."""
        record = self.place.record.read()
        return record.pieces & record.synced

    def paths(self) -> list[Path]:
        """The wanted files."""
        return [self.place.data / path for path in self.selection.wanted]

    def partial_files(self) -> frozenset[str]:
        """Wanted files of which not every piece is on record."""
        there = self.verified()
        return frozenset(
            path for path in self.selection.wanted if not self.file_pieces([path]) <= there
        )

    def missing_bytes(self) -> int:
        """Bytes of wanted pieces that take no room on the disk yet."""
        if self.is_intact():
            return 0
        there = fingerprints(self.place.data, self.selection.wanted)
        if self._share is None:
            return sum(
                max(0, self.metainfo.file(path).length - there[path].allocated)
                if path in there
                else self.metainfo.file(path).length
                for path in self.selection.wanted
            )
        wanted, known = self.wanted(), self.verified()
        num_bytes = self.piece_map.num_bytes
        if known:
            return num_bytes(wanted - known)
        # After a crash nobody knows which pieces take the room; what is there is counted for us.
        return max(0, num_bytes(wanted) - sum(file.allocated for file in there.values()))

    def spare_pieces(self, held: frozenset[int]) -> int:
        """How many pieces the disk takes besides those that are wanted, without its reserve.

        None for a node that wants no weights: it is there for something else.
        """
        if self._share is not None and not self._share:
            return 0
        missing = self.piece_map.num_bytes(self.wanted() - held)
        spare = shutil.disk_usage(self.place.root).free - missing - RESERVE_BYTES
        return max(0, spare) // self.piece_map.piece_length

    def first_look(self) -> set[int]:
        """Config and tokenizer, and of weights the first and last piece: headers are there."""
        pieces: set[int] = set()
        for path in self.selection.wanted:
            of_file = self.metainfo.pieces(self.metainfo.file(path))
            is_weights = path in self.selection.weights
            pieces.update((of_file[0], of_file[-1]) if is_weights else of_file)
        return pieces

    def file_bytes(self) -> int:
        """Sizes of the wanted files that are there, holes included."""
        return sum(
            file.size for file in fingerprints(self.place.data, self.selection.wanted).values()
        )

    def piece_check(self) -> PieceCheck:
        """Reads pieces back from the files."""
        return PieceCheck(self.metainfo, self.place.data, wanted=self.selection.wanted)

    def remember(
        self,
        there: frozenset[int],
        *,
        done: bool = False,
        is_writing: bool = False,
        synced: Collection[int] = (),
    ) -> None:
        """Writes down which pieces are there, and which of them are `synced` to the disk.

        `done`: everything wanted is, and nothing is under way. `is_writing`: the files go on
        changing by our own hand, so that the next run may find more.
        """
        earlier = self.place.record.read()
        now = fingerprints(self.place.data, self.selection.wanted)
        md5 = {
            path: digest
            for path, digest in earlier.md5.items()
            if path in now and earlier.files.get(path) == now[path]
        }
        self.place.record.write(
            Record(
                complete=done and self.file_pieces(self.selection.wanted) <= there,
                files=now,
                md5=md5,
                pieces=there,
                is_writing=is_writing,
                boot=self._boot,
                synced=there.intersection(synced),
            )
        )

    def forget(self) -> None:
        """Claims nothing any more."""
        self.place.record.write(Record())

    def file_pieces(self, paths: Iterable[str]) -> frozenset[int]:
        """All pieces of these files, which are named as in the torrent."""
        return frozenset(
            piece for path in paths for piece in self.metainfo.pieces(self.metainfo.file(path))
        )
