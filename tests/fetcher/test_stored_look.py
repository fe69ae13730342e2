"""Looking at a release while another process works on it, and waiting until it is done."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from magnetar.errors import InterruptedByUserError, PreflightError
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.tests.fetching import no_session
from magnetar.tests.releases import HINTS, write_release
from magnetar.tests.seeder import seeding

WANTED = {"given": HINTS, "known": HINTS}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeedInfo]:
    release = tmp_path_factory.mktemp("seed") / "tiny-moe"
    write_release(release, layout="mistral-pth")
    with seeding(release) as info:
        yield info


class Looker:
    """A fetch that has no network, and what it says."""

    def __init__(self, seed: SeedInfo, store: Path, *, timeout_s: float | None = None) -> None:
        self.said: list[str] = []
        self.stop = threading.Event()
        self.heard = threading.Event()
        self.fetch = Fetch(
            kind="magnet",
            location=seed.magnet,
            store=store,
            timeout_s=timeout_s,
            on_progress=self._hear,
            stop=self.stop,
            session_factory=no_session,
        )

    def _hear(self, progress: Progress) -> None:
        self.said.append(progress.message)
        self.heard.set()


def fetch_of(seed: SeedInfo, store: Path) -> Fetch:
    return Fetch(
        kind="magnet",
        location=seed.magnet,
        store=store,
        peers=(seed.address,),
        on_progress=lambda progress: None,
        stop=threading.Event(),
        who="deployment one",
    )


def test_what_describes_a_release_is_read_while_another_brings_the_rest(
    seed: SeedInfo, tmp_path: Path
) -> None:
    with fetch_of(seed, tmp_path) as working:
        assert Looker(seed, tmp_path).fetch.look(**WANTED) is None
        facts = working.facts(**WANTED)
        look = Looker(seed, tmp_path).fetch.look(**WANTED)
        assert look is not None
        assert (look.facts.config, look.facts.index) == (facts.config, facts.index)
        assert look.sizes == working.sizes()
        with pytest.raises(PreflightError, match=r"\(deployment one\) is working on this release"):
            Looker(seed, tmp_path).fetch.metadata()


def test_a_description_that_was_damaged_is_not_read(seed: SeedInfo, tmp_path: Path) -> None:
    with fetch_of(seed, tmp_path) as working:
        working.facts(**WANTED)
        weights = working.folder() / "consolidated.00.pth"
        with weights.open("r+b") as file:
            file.seek(100)
            file.write(b"x")
        assert Looker(seed, tmp_path).fetch.look(**WANTED) is None


def test_whoever_comes_second_waits_until_the_first_is_done(seed: SeedInfo, tmp_path: Path) -> None:
    second = Looker(seed, tmp_path)
    with fetch_of(seed, tmp_path) as working:
        working.download()
        waiting = threading.Thread(target=lambda: second.fetch.metadata(waits=True))
        waiting.start()
        assert second.heard.wait(20)
        assert "waiting for process" in second.said[0]
        assert "deployment one" in second.said[0]
    waiting.join(20)
    with second.fetch:
        assert second.said[-1] == "tiny-moe"
        second.fetch.download()


def test_waiting_ends_when_it_is_stopped_or_takes_too_long(seed: SeedInfo, tmp_path: Path) -> None:
    place = Store(tmp_path).release_folder(seed.info_hash)
    place.lock()
    with pytest.raises(PreflightError, match="is working on this release"):
        Looker(seed, tmp_path, timeout_s=0.01).fetch.metadata(waits=True)
    stopped = Looker(seed, tmp_path)
    stopped.stop.set()
    with pytest.raises(InterruptedByUserError):
        stopped.fetch.metadata(waits=True)
    place.unlock()
