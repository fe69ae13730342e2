"""A byte that flips on the disk after the download does not get into a model."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from magnetar.errors import VerifyError
from magnetar.fetcher.checkpoint.arriving import ArrivingTensorSource
from magnetar.fetcher.checkpoint.release import FolderReader, ReleaseFacts, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.fetch import Fetch, FetchKind
from magnetar.fetcher.folder_sums import FolderSums
from magnetar.fetcher.piece_map import ByteRange, ranges_of
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.store import Store
from magnetar.fetcher.tensors import TensorEntry
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.tests.releases import HINTS, write_release
from magnetar.tests.seeder import seeding

WEIGHTS = "consolidated.00.pth"


class Shared(NamedTuple):
    folder: Path
    info: SeedInfo
    facts: ReleaseFacts

    def steps(self) -> list[tuple[TensorEntry, ...]]:
        return [self.facts.index.layer(0), self.facts.index.layer(1)]

    @property
    def piece_length(self) -> int:
        return parse_metainfo(self.info.torrent).piece_length


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared") / "tiny-release"
    write_release(folder, layout="mistral-pth", num_layers=2)
    facts = read_release(FolderReader(folder), given=ReleaseHints(), known=HINTS)
    with seeding(folder) as info:
        yield Shared(folder, info, facts)


class Ours:
    """`Arrivals` by a fetch in the same thread, which has everything."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.mended: list[ByteRange] = []

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        assert self.fetch.wait(ranges, 0)

    def mend(self, part: ByteRange) -> None:
        self.mended.append(part)
        self.fetch.mend(part)


def fetching(location: str, store: Path, kind: FetchKind = "magnet") -> Fetch:
    def ignore(progress: Progress) -> None: ...

    return Fetch(
        kind=kind,
        location=location,
        store=store,
        on_progress=ignore,
        stop=threading.Event(),
        timeout_s=30,
    )


def load(fetch: Fetch, shared: Shared) -> tuple[Ours, ArrivingTensorSource]:
    """Reads every tensor of the steps as a stage does; each must be the publisher's."""
    ours = Ours(fetch)
    source = ArrivingTensorSource(
        fetch.folder(), shared.facts.index, shared.steps(), ours, checks=fetch.load_checks()
    )
    whole = FileTensorSource(shared.folder, shared.facts.index)
    for step in shared.steps():
        for entry in step:
            assert torch.equal(source.read(entry.name), whole.read(entry.name)), entry.name
    fetch.keep_sums(source.checked.found)
    return ours, source


def flip(path: Path, at: int) -> None:
    """As a failing disk does it: size and time of the file stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("share", ["whole", "layers"])
def test_a_flipped_byte_is_found_at_load_and_only_its_piece_is_fetched_again(
    shared: Shared, tmp_path: Path, share: str
) -> None:
    target = shared.steps()[0][3]
    with fetching(shared.info.magnet, tmp_path) as fetch:
        if share == "layers":
            fetch.restrict(ranges_of(entry for step in shared.steps() for entry in step))
        folder = fetch.download()
        fetch.verify()
        before = fetch.received_bytes
        flip(folder / WEIGHTS, target.offset + target.num_bytes // 2)
        ours, source = load(fetch, shared)
        # Whoever reads a byte of that piece first finds it.
        assert len(ours.mended) == 1
        assert fetch.received_bytes - before == shared.piece_length
        assert len(source.checked.found) == sum(map(len, shared.steps()))

    # The next time the sums are known, and need no pieces around the tensors.
    with fetching(shared.info.magnet, tmp_path) as fetch:
        if share == "layers":
            fetch.restrict(ranges_of(entry for step in shared.steps() for entry in step))
        fetch.download()
        ours, source = load(fetch, shared)
        assert (ours.mended, source.checked.found, fetch.received_bytes) == ([], {}, 0)
    flip(folder / WEIGHTS, target.offset)
    with fetching(shared.info.magnet, tmp_path) as fetch:
        if share == "layers":
            fetch.restrict(ranges_of(entry for step in shared.steps() for entry in step))
        fetch.download()
        ours, source = load(fetch, shared)
        assert len(ours.mended) == 1
        assert fetch.received_bytes == shared.piece_length
    assert (folder / WEIGHTS).read_bytes()[target.offset] == (
        (shared.folder / WEIGHTS).read_bytes()[target.offset]
    )


def test_a_sum_that_was_wrong_itself_gives_way_to_the_pieces(
    shared: Shared, tmp_path: Path
) -> None:
    first = shared.steps()[0][0]
    wrong = {ByteRange(first.file, first.offset, first.num_bytes): "00" * 32}
    with fetching(shared.info.magnet, tmp_path) as fetch:
        fetch.download()
        before = fetch.received_bytes
        fetch.keep_sums(wrong)
        ours, source = load(fetch, shared)
        assert list(wrong) == ours.mended
        assert wrong.keys() <= source.checked.found.keys()
        assert fetch.received_bytes == before


def test_a_folder_is_checked_against_its_first_reading_and_cannot_be_mended(
    shared: Shared, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for path in shared.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    target = shared.steps()[1][2]
    with fetching(str(folder), tmp_path / "store", kind="folder") as fetch:
        load(fetch, shared)
        flip(folder / WEIGHTS, target.offset)
        with pytest.raises(VerifyError, match="restore the file"):
            load(fetch, shared)
        # A file that somebody wrote to holds what they wanted.
        os.utime(folder / WEIGHTS)
        checks = fetch.load_checks()
        assert checks.manifest.sums == {}


def test_sums_of_a_folder_can_be_made_before_anybody_loads_it(
    shared: Shared, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for path in shared.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    FolderSums(Store(tmp_path / "store"), folder).compute(threading.Event())
    target = shared.steps()[0][0]
    with fetching(str(folder), tmp_path / "store", kind="folder") as fetch:
        ours, source = load(fetch, shared)
        assert (ours.mended, source.checked.found) == ([], {})
        flip(folder / WEIGHTS, target.offset)
        with pytest.raises(VerifyError, match="restore the file"):
            load(fetch, shared)
