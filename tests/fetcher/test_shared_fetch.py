"""Several nodes that fetch one release together; the seeder is another process and address."""

import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.ownership import Role, assign_roles
from magnetar.fetcher.piece_map import ByteRange, PieceMap
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent import sharing
from magnetar.fetcher.torrent.disk_room import RESERVE_BYTES
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.fetcher.torrent.seed import SeedInfo
from magnetar.tests.seeder import seeding

WEIGHTS = "consolidated.00.pth"
WEIGHTS_BYTES = 8_000_000
SEED_HOST = "127.0.0.2"
LAN_HOSTS = ("127.0.0.11", "127.0.0.12", "127.0.0.13", "127.0.0.14")
UPLOAD_BYTES_PER_S = 4_000_000


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeedInfo]:
    folder = tmp_path_factory.mktemp("shared") / "release"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes(WEIGHTS_BYTES))
    (folder / "tokenizer.model").write_bytes(b"t" * 1000)
    (folder / "params.json").write_text("{}")
    with seeding(folder, listen=f"{SEED_HOST}:0", upload_bytes_per_s=UPLOAD_BYTES_PER_S) as info:
        yield info


@contextmanager
def nodes(seed: SeedInfo, store: Path, shares: Sequence[list[ByteRange]]) -> Iterator[list[Fetch]]:
    def ignore(progress: Progress) -> None: ...

    with ExitStack() as stack:
        fetches = [
            stack.enter_context(
                Fetch(
                    kind="magnet",
                    location=seed.magnet,
                    store=store / str(number),
                    on_progress=ignore,
                    stop=threading.Event(),
                    timeout_s=60,
                    node=f"n{number}",
                    lan_address=LAN_HOSTS[number],
                )
            )
            for number in range(len(shares))
        ]
        for fetch, share in zip(fetches, shares, strict=True):
            fetch.restrict(share)
        yield fetches


def roles_of(fetches: list[Fetch]) -> dict[str, Role]:
    members = [member for fetch in fetches if (member := fetch.join()) is not None]
    for member, host in zip(members, LAN_HOSTS, strict=False):
        assert member.address.startswith(f"{host}:")
    return dict(assign_roles(members))


def together(fetches: list[Fetch], work: Callable[[Fetch], object]) -> None:
    with ThreadPoolExecutor(len(fetches)) as pool:
        list(pool.map(work, fetches))


def quarters() -> list[list[ByteRange]]:
    """A fifth for everybody, and a quarter of the rest for each."""
    common = WEIGHTS_BYTES // 5
    own = (WEIGHTS_BYTES - common) // 4
    return [
        [ByteRange(WEIGHTS, 0, common), ByteRange(WEIGHTS, common + number * own, own)]
        for number in range(4)
    ]


def test_every_byte_comes_from_outside_once(seed: SeedInfo, tmp_path: Path) -> None:
    with nodes(seed, tmp_path, quarters()) as fetches:
        roles = roles_of(fetches)
        for number, fetch in enumerate(fetches):
            fetch.share(roles[f"n{number}"])
        together(fetches, lambda fetch: fetch.download())
        together(fetches, Fetch.count)
        received = sum(fetch.received_bytes for fetch in fetches)
        from_outside = received - sum(fetch.sent_bytes for fetch in fetches)
        traffic = [fetch.traffic for fetch in fetches]
        together(fetches, lambda fetch: fetch.verify())
        wanted = sum(fetch.wanted_bytes for fetch in fetches)
    # What one had from another is what that gave it, by either's account and by peer.
    assert sum(each.lan_sent_bytes for each in traffic) == sum(each.sent_bytes for each in traffic)
    lan_received = sum(each.lan_received_bytes for each in traffic)
    assert lan_received == sum(each.lan_sent_bytes for each in traffic) == received - from_outside
    for each in traffic:
        sides = {peer.address.partition(":")[0]: peer.side for peer in each.peers}
        assert {host for host, side in sides.items() if side == "lan"} <= set(LAN_HOSTS)
    piece_map = PieceMap.of_torrent(parse_metainfo(seed.torrent), root="release/")
    unique = piece_map.num_bytes(range(piece_map.num_pieces))
    assert wanted > 1.5 * unique
    assert received >= wanted
    assert unique <= from_outside <= 1.02 * unique, from_outside / unique
    weights = tmp_path / "0" / "releases" / seed.info_hash / "data" / "release" / WEIGHTS
    common = WEIGHTS_BYTES // 5
    assert weights.read_bytes()[:common] == random.Random(0).randbytes(WEIGHTS_BYTES)[:common]


def test_a_node_says_for_how_many_pieces_of_others_it_has_room(
    seed: SeedInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes(seed, tmp_path, quarters()[:2]) as fetches:
        before = fetches[0].join()
        piece_map = fetches[0].piece_map()
        assert before is not None
        assert piece_map is not None
        missing_bytes = piece_map.num_bytes(before.wanted - before.held)

        def disk_usage(folder: Path) -> SimpleNamespace:
            spare_bytes = piece_map.piece_length * 7 // 2
            return SimpleNamespace(free=RESERVE_BYTES + missing_bytes + spare_bytes)

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        member = fetches[0].member()
        assert member is not None
        assert member.room == 3
        assert member.order.pieces == member.wanted
        # A node that only answers requests keeps no weights for others.
        fetches[0].restrict([])
        idle = fetches[0].member()
        assert idle is not None
        assert idle.room == 0


def test_a_node_that_joins_later_takes_what_the_others_hold(seed: SeedInfo, tmp_path: Path) -> None:
    everything = [ByteRange(WEIGHTS, 0, WEIGHTS_BYTES)]
    with nodes(seed, tmp_path, [everything]) as fetches:
        fetches[0].download()
        fetches[0].verify()
    with nodes(seed, tmp_path, [everything, everything]) as fetches:
        roles = roles_of(fetches)
        assert not roles["n0"].owned | roles["n1"].owned
        for number, fetch in enumerate(fetches):
            fetch.share(roles[f"n{number}"])
        together(fetches, lambda fetch: fetch.download())
        together(fetches, Fetch.count)
        assert fetches[0].received_bytes == 0
        assert fetches[1].received_bytes == fetches[0].sent_bytes >= WEIGHTS_BYTES


def test_what_a_partner_does_not_bring_comes_from_outside(
    seed: SeedInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sharing, "PATIENCE_S", 1.0)
    everything = [ByteRange(WEIGHTS, 0, WEIGHTS_BYTES)]
    with nodes(seed, tmp_path, [everything, everything]) as fetches:
        roles = roles_of(fetches)
        fetches[1].close()
        fetches[0].share(roles["n0"])
        folder = fetches[0].download()
        assert roles["n0"].borrowed
        assert (folder / WEIGHTS).read_bytes() == random.Random(0).randbytes(WEIGHTS_BYTES)
    assert "other nodes bring nothing" in caplog.text
