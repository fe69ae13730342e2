"""Whatever the layout: of a partial release come the right numbers, or an error, never a hole."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.errors import CheckpointError
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.piece_map import PieceMap, ranges_of
from magnetar.fetcher.tensors import MissingRangeError, TensorIndex
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import Metainfo, parse_metainfo
from magnetar.fetcher.torrent.pieces import PieceReader
from magnetar.tests.releases import HINTS, LAYOUTS, Layout, write_release

PIECE_BYTES = 16 << 10


class Partial:
    """A release of one layout, of which a test keeps some pieces; the rest reads as zeros."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        complete = folder / "complete" / "release"
        write_release(complete, layout=layout, num_layers=1)
        self.index: TensorIndex = read_release(
            FolderReader(complete), given=ReleaseHints(), known=HINTS
        ).index
        self.whole = FileTensorSource(complete, self.index)
        raw = create_torrent(complete, piece_length=PIECE_BYTES)
        self.metainfo: Metainfo = parse_metainfo(raw)
        self.piece_map = PieceMap.of_torrent(self.metainfo, root="release/")
        self.data = folder / "data"
        self._bytes = {
            name: (complete / name).read_bytes() for name in FolderReader(complete).files()
        }

    def keep(self, pieces: set[int]) -> None:
        """Writes the files with these pieces, and holes elsewhere."""
        for name, raw in self._bytes.items():
            target = self.data / "release" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            holed = bytearray(len(raw))
            for part in self.piece_map.readable(pieces):
                if part.file == name:
                    holed[part.offset : part.end] = raw[part.offset : part.end]
            target.write_bytes(holed)


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Partial]:
    made: dict[Layout, Partial] = {}

    def make(layout: Layout) -> Partial:
        if layout not in made:
            made[layout] = Partial(tmp_path_factory.mktemp(layout), layout)
        return made[layout]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_tensor_is_read_whole_and_right_or_not_at_all(
    partial: Callable[[Layout], Partial], layout: Layout, data: st.DataObject
) -> None:
    release = partial(layout)
    pieces = data.draw(st.sets(st.integers(0, release.metainfo.num_pieces - 1)))
    release.keep(pieces)
    source = FileTensorSource(
        release.data / "release", release.index, verified=release.piece_map.readable(pieces)
    )
    reader = PieceReader(
        metainfo=release.metainfo,
        data=release.data,
        root="release/",
        wanted=[file.path for file in release.metainfo.files],
    )
    reader.mark_readable(pieces)

    for entry in release.index:
        is_there = release.piece_map.pieces(ranges_of([entry])) <= pieces
        if is_there:
            assert torch.equal(source.read(entry.name), release.whole.read(entry.name))
            reader.read(entry.file, entry.offset, entry.num_bytes)
            continue
        with pytest.raises(CheckpointError, match="was not downloaded to this node"):
            source.read(entry.name)
        with pytest.raises(MissingRangeError):
            reader.read(entry.file, entry.offset, entry.num_bytes)
