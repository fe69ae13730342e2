"""What a store holds is given to named hosts alone, before anybody outside is asked for it."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from magnetar.errors import TimedOutError
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.piece_map import ByteRange, PieceMap
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent import sharing
from magnetar.fetcher.torrent.lending import Lender, Lending
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.tests.seeder import seeding

WEIGHTS = "consolidated.00.pth"
WEIGHTS_BYTES = 6_000_000
SEED_HOST = "127.0.0.2"
LENDER_HOST = "127.0.0.11"
BORROWER_HOST = "127.0.0.12"
EVERYTHING = ByteRange(WEIGHTS, 0, WEIGHTS_BYTES)
HALF = ByteRange(WEIGHTS, 0, WEIGHTS_BYTES // 2)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lent") / "release"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes(WEIGHTS_BYTES))
    (folder / "tokenizer.model").write_bytes(b"t" * 1000)
    (folder / "params.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def seed(release: Path) -> Iterator[SeedInfo]:
    with seeding(release, listen=f"{SEED_HOST}:0") as info:
        yield info


def fetching(magnet: str, store: Path, *, timeout_s: float = 30) -> Fetch:
    def ignore(progress: Progress) -> None: ...

    return Fetch(
        kind="magnet",
        location=magnet,
        store=store,
        on_progress=ignore,
        stop=threading.Event(),
        timeout_s=timeout_s,
        dht=False,
    )


@contextmanager
def lent(seed: SeedInfo, store: Path, share: ByteRange) -> Iterator[Lending]:
    """By a node that fetched this share before, and ended."""
    with fetching(seed.magnet, store) as fetch:
        fetch.restrict([share])
        fetch.download()
        fetch.verify()
    place = Store(store).release_folder(seed.info_hash)
    lending = Lending.open(place, host="n0", address=LENDER_HOST)
    assert lending is not None
    with ExitStack() as stack:
        stack.callback(lending.close)
        assert place.is_used()
        yield lending
    assert not place.is_used()


def nobody(seed: SeedInfo) -> str:
    """The link without its peer: there is nobody outside."""
    return seed.magnet.partition("&x.pe")[0]


def comes_to_have_sent(lending: Lending, num_bytes: int) -> bool:
    """Readings are up to two seconds old."""
    deadline_s = time.monotonic() + 10
    while lending.sent_bytes != num_bytes and time.monotonic() < deadline_s:
        threading.Event().wait(0.05)
    return lending.sent_bytes == num_bytes


def weights(store: Path, seed: SeedInfo) -> bytes:
    return (store / "releases" / seed.info_hash / "data/release" / WEIGHTS).read_bytes()


def test_a_release_that_is_held_needs_nobody_outside(
    seed: SeedInfo, release: Path, tmp_path: Path
) -> None:
    with lent(seed, tmp_path / "0", EVERYTHING) as lending:
        lending.admit([BORROWER_HOST])
        with fetching(nobody(seed), tmp_path / "1") as fetch:
            assert fetch.identify() == seed.info_hash
            fetch.borrow([lending.lender], lan_address=BORROWER_HOST)
            fetch.metadata()
            fetch.download()
            fetch.verify()
            assert fetch.received_bytes >= WEIGHTS_BYTES
    assert weights(tmp_path / "1", seed) == (release / WEIGHTS).read_bytes()


def test_only_what_nobody_holds_comes_from_outside(
    seed: SeedInfo, release: Path, tmp_path: Path
) -> None:
    with lent(seed, tmp_path / "0", HALF) as lending:
        lending.admit([BORROWER_HOST])
        # From the seed by another address than the one that the lender lets in.
        with fetching(seed.magnet, tmp_path / "1") as fetch:
            fetch.borrow([lending.lender], lan_address=BORROWER_HOST)
            fetch.download()
            fetch.count()
            received = fetch.received_bytes
        piece_map = PieceMap.of_torrent(parse_metainfo(seed.torrent), root="release/")
        missing = frozenset(range(piece_map.num_pieces)) - lending.lender.held
        assert fetch.traffic.lan_received_bytes == piece_map.num_bytes(lending.lender.held)
        assert comes_to_have_sent(lending, piece_map.num_bytes(lending.lender.held))
        assert received - lending.sent_bytes == piece_map.num_bytes(missing) > 0
    assert weights(tmp_path / "1", seed) == (release / WEIGHTS).read_bytes()


def test_what_is_held_comes_before_anything_is_asked_for_outside(
    seed: SeedInfo, tmp_path: Path
) -> None:
    with lent(seed, tmp_path / "0", HALF) as lending:
        lending.admit([BORROWER_HOST])
        with fetching(nobody(seed), tmp_path / "1", timeout_s=2) as fetch:
            fetch.borrow([lending.lender], lan_address=BORROWER_HOST)
            with pytest.raises(TimedOutError):
                fetch.download()
            held = fetch.piece_map()
            assert held is not None
            assert fetch.received_bytes >= held.num_bytes(lending.lender.held)


def test_nobody_is_let_in_who_did_not_ask(seed: SeedInfo, tmp_path: Path) -> None:
    with lent(seed, tmp_path / "0", EVERYTHING) as lending:
        lending.admit(["127.0.0.13"])
        link = f"{nobody(seed)}&x.pe={lending.lender.address}"
        with fetching(link, tmp_path / "1", timeout_s=2) as fetch, pytest.raises(TimedOutError):
            fetch.metadata()


def test_a_lender_that_is_gone_holds_nothing_up(
    seed: SeedInfo, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "PATIENCE_S", 1.0)
    with lent(seed, tmp_path / "0", EVERYTHING) as lending:
        gone: Lender = lending.lender
    with fetching(seed.magnet, tmp_path / "1") as fetch:
        fetch.borrow([gone], lan_address=BORROWER_HOST)
        fetch.download()
    assert weights(tmp_path / "1", seed) == (release / WEIGHTS).read_bytes()


def test_what_is_still_being_fetched_is_not_lent(seed: SeedInfo, tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert (
        Lending.open(store.release_folder(seed.info_hash), host="n0", address=LENDER_HOST) is None
    )
    with fetching(seed.magnet, tmp_path) as fetch:
        fetch.metadata()
        place = store.release_folder(seed.info_hash)
        assert Lending.open(place, host="n0", address=LENDER_HOST) is None
        fetch.download()
    (place.data / "release" / WEIGHTS).touch()
    assert Lending.open(place, host="n0", address=LENDER_HOST) is None
