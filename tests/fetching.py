"""Releases of noise, and fetches of them into one store that keep what they told."""

import dataclasses
import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from magnetar.fetcher.fetch import Fetch, FetchKind
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent.libtorrent_session import LibtorrentSession
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.fetcher.torrent.session import (
    SessionSettings,
    TorrentSession,
)

WEIGHTS = "consolidated.00.pth"
WEIGHTS_BYTES = 3_000_000


def write_files(folder: Path) -> Path:
    """Files with the names of a release; the weights are noise, which nothing here reads."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    (folder / WEIGHTS).write_bytes(noise.randbytes(WEIGHTS_BYTES))
    (folder / "tokenizer.model").write_bytes(noise.randbytes(50_000))
    (folder / "params.json").write_text('{"dim": 64}')
    (folder / "README.md").write_text("surplus" * 100)
    write_sums(folder, WEIGHTS, "tokenizer.model")
    return folder


def write_sums(folder: Path, *names: str) -> None:
    rows = [
        f"║ {hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name} ║" for name in names
    ]
    (folder / "RELEASE").write_text("\n".join(["╔═╗", *rows, "╚═╝"]))


class Shared(NamedTuple):
    """A release folder and a process that shares it."""

    folder: Path
    info: SeedInfo

    @property
    def wanted_bytes(self) -> int:
        """What a complete download holds."""
        return sum(p.stat().st_size for p in self.folder.iterdir() if p.name != "README.md")

    @property
    def piece_length(self) -> int:
        return parse_metainfo(self.info.torrent).piece_length


def no_session(settings: SessionSettings) -> TorrentSession:
    raise AssertionError("nothing may ask the network")


@dataclasses.dataclass
class Fetching:
    """Makes fetches into one store and keeps what they told."""

    store: Path
    told: list[Progress] = dataclasses.field(default_factory=list)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    on_progress: Callable[[Progress], None] = lambda progress: None

    def __call__(
        self,
        location: str,
        *,
        kind: FetchKind = "magnet",
        offline: bool = False,
        timeout_s: float | None = 30,
        peers: tuple[str, ...] = (),
        trackers: tuple[str, ...] = (),
    ) -> Fetch:
        def tell(progress: Progress) -> None:
            self.told.append(progress)
            self.on_progress(progress)

        return Fetch(
            kind=kind,
            location=location,
            store=self.store,
            on_progress=tell,
            stop=self.stop,
            timeout_s=timeout_s,
            peers=peers,
            trackers=trackers,
            node="n1",
            session_factory=no_session if offline else LibtorrentSession,
        )


def complete(fetch: Fetch) -> Path:
    with fetch:
        folder = fetch.download()
        fetch.verify()
    return folder


def assert_same_files(folder: Path, source: Path) -> None:
    names = {path.name for path in source.iterdir()} - {"README.md"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
