"""Fetching the pieces of some tensors alone, from a real seeder in another process."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from magnetar.errors import CheckpointError, DiskSpaceError, ReleaseError
from magnetar.fetcher.checkpoint.release import FolderReader, ReleaseFacts, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.piece_map import ByteRange, PieceMap, ranges_of
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.store import Store
from magnetar.fetcher.tensors import TensorEntry
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.fetcher.torrent.session import SessionSettings, TorrentSession
from magnetar.tests.releases import HINTS, write_release
from magnetar.tests.seeder import seeding

WEIGHTS = "consolidated.00.pth"
SMALL = ("params.json", "tokenizer.model", "RELEASE")


class Shared(NamedTuple):
    """A release folder and a process that shares it."""

    folder: Path
    info: SeedInfo
    facts: ReleaseFacts

    @property
    def piece_map(self) -> PieceMap:
        return PieceMap.of_torrent(parse_metainfo(self.info.torrent), root=f"{self.folder.name}/")

    def layers(self, first: int, end: int) -> tuple[TensorEntry, ...]:
        index = self.facts.index
        return tuple(entry for layer in range(first, end) for entry in index.layer(layer))

    def share(self, entries: tuple[TensorEntry, ...]) -> frozenset[int]:
        """The pieces of these tensors and of the small files."""
        small = [piece for name in SMALL for piece in self.piece_map.file_pieces(name)]
        return self.piece_map.pieces(ranges_of(entries)) | frozenset(small)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared") / "tiny-release"
    write_release(folder, layout="mistral-pth", num_layers=4)
    facts = read_release(FolderReader(folder), given=ReleaseHints(), known=HINTS)
    with seeding(folder) as info:
        yield Shared(folder, info, facts)


def no_session(settings: SessionSettings) -> TorrentSession:
    raise AssertionError("nothing may ask the network")


Fetching = Callable[..., Fetch]


@pytest.fixture
def fetching(shared: Shared, tmp_path: Path) -> Fetching:
    def start(*, offline: bool = False) -> Fetch:
        def ignore(progress: Progress) -> None: ...

        return Fetch(
            kind="magnet",
            location=shared.info.magnet,
            store=tmp_path / "store",
            on_progress=ignore,
            stop=threading.Event(),
            timeout_s=30,
            session_factory=no_session if offline else LibtorrentSession,
        )

    return start


def test_brings_exactly_the_pieces_of_a_share_and_reads_nothing_else(
    shared: Shared, fetching: Fetching
) -> None:
    entries = shared.layers(0, 1)
    share = shared.share(entries)
    with fetching() as fetch:
        fetch.restrict(ranges_of(entries))
        fetch.check_disk()
        folder = fetch.download()
        fetch.verify()
        verified = fetch.verified()
        assert fetch.received_bytes == shared.piece_map.num_bytes(share)
        assert fetch.wanted_bytes == fetch.received_bytes
        # The whole file was not there, so that its published sum could not be checked.
        assert fetch.hashed_bytes < (shared.folder / WEIGHTS).stat().st_size
    assert verified == shared.piece_map.readable(share)
    for name in SMALL:
        assert (folder / name).read_bytes() == (shared.folder / name).read_bytes()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
    weights = folder / WEIGHTS
    page = os.statvfs(folder).f_bsize
    assert weights.stat().st_blocks * 512 <= shared.piece_map.num_bytes(share) + 8 * page

    source = FileTensorSource(folder, shared.facts.index, verified=verified)
    whole = FileTensorSource(shared.folder, shared.facts.index)
    for entry in entries:
        assert torch.equal(source.read(entry.name), whole.read(entry.name))
    for entry in shared.layers(2, 4):
        if not shared.piece_map.pieces(ranges_of([entry])) <= share:
            with pytest.raises(CheckpointError, match="was not downloaded to this node"):
                source.read(entry.name)


def test_the_same_share_again_asks_nobody_and_more_brings_only_the_rest(
    shared: Shared, fetching: Fetching, tmp_path: Path
) -> None:
    first, more = shared.layers(0, 1), shared.layers(0, 3)
    with fetching() as fetch:
        fetch.restrict(ranges_of(first))
        fetch.download()
        fetch.verify()
    with fetching(offline=True) as fetch:
        fetch.restrict(ranges_of(first))
        fetch.check_disk()
        fetch.download()
        fetch.verify()
        assert fetch.hashed_bytes == 0
    assert [release.complete for release in Store(tmp_path / "store").releases()] == [False]

    rest = shared.share(more) - shared.share(first)
    with fetching() as fetch:
        fetch.restrict(ranges_of(more))
        fetch.download()
        fetch.verify()
        assert fetch.received_bytes == shared.piece_map.num_bytes(rest)
        assert fetch.hashed_bytes == 0
        # And the same session goes on to the whole release, whose published sums then count.
        fetch.restrict(None)
        folder = fetch.download()
        fetch.verify()
        assert fetch.verified() is None
        assert fetch.hashed_bytes >= (folder / WEIGHTS).stat().st_size
    for name in (WEIGHTS, *SMALL):
        assert (folder / name).read_bytes() == (shared.folder / name).read_bytes()
    assert [release.complete for release in Store(tmp_path / "store").releases()] == [True]


def test_facts_before_and_after_a_share(shared: Shared, fetching: Fetching) -> None:
    entries = shared.layers(1, 2)
    with fetching() as fetch:
        assert fetch.facts(given=ReleaseHints(), known=HINTS) == shared.facts
        fetch.restrict(ranges_of(entries))
        fetch.download()
        fetch.verify()
        assert fetch.facts(given=ReleaseHints(), known=HINTS) == shared.facts
        ends = shared.piece_map.head_and_tail([WEIGHTS])
        expected = shared.piece_map.num_bytes(shared.share(entries) | ends)
        assert expected <= fetch.received_bytes <= expected + 8 * shared.piece_map.piece_length


def test_damage_of_a_share_costs_one_piece(shared: Shared, fetching: Fetching) -> None:
    entries = shared.layers(0, 1)
    with fetching() as fetch:
        fetch.restrict(ranges_of(entries))
        folder = fetch.download()
        fetch.verify()
    entry = entries[0]
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(entry.offset)
        byte = file.read(1)[0]
        file.seek(entry.offset)
        file.write(bytes([byte ^ 1]))
    with fetching() as fetch:
        fetch.restrict(ranges_of(entries))
        fetch.verify()
        assert fetch.received_bytes == shared.piece_map.piece_length
        source = FileTensorSource(fetch.download(), shared.facts.index, verified=fetch.verified())
    whole = FileTensorSource(shared.folder, shared.facts.index)
    assert torch.equal(source.read(entry.name), whole.read(entry.name))


def test_the_disk_need_only_hold_the_share(
    shared: Shared, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = shared.layers(0, 1)
    needed = shared.piece_map.num_bytes(shared.share(entries))
    usage = shutil.disk_usage("/")._replace(free=needed * 11 // 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with fetching() as fetch:
        with pytest.raises(DiskSpaceError):
            fetch.check_disk()
        fetch.restrict(ranges_of(entries))
        fetch.check_disk()


def test_refuses_bytes_that_the_release_does_not_have(fetching: Fetching) -> None:
    with fetching() as fetch, pytest.raises(ReleaseError, match="no file nope"):
        fetch.restrict([ByteRange("nope", 0, 1)])
