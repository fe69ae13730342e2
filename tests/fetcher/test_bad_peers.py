"""Peers that send what they like, among peers that do not."""

import random
import threading
from pathlib import Path

import pytest

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.torrent.create import create_torrent
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.tests.lab.wire_peers import WirePeer, WirePeers

WEIGHTS = "consolidated.00.pth"
PIECE_BYTES = 1 << 19
NUM_BYTES = 24 * PIECE_BYTES + 5
MAX_PIECES = 8
"""What one of them may come to send: two or three, but for unlucky beginnings."""


def ignore(progress: Progress) -> None: ...


@pytest.mark.parametrize(("num_peers", "num_bad"), [(5, 2), (9, 6)])
def test_garbage_never_stays_on_the_disk_and_who_sent_it_is_soon_shut_out(
    tmp_path: Path, num_peers: int, num_bad: int
) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    content = random.Random(0).randbytes(NUM_BYTES)
    (folder / WEIGHTS).write_bytes(content)
    (folder / "params.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"t")
    torrent = tmp_path / "torrent"
    torrent.write_bytes(raw := create_torrent(folder, piece_length=PIECE_BYTES))
    whole = content + b"{}t"

    def right(piece: int, begin: int, size: int) -> bytes:
        start = piece * PIECE_BYTES + begin
        return whole[start : start + size]

    def wrong(piece: int, begin: int, size: int) -> bytes:
        return bytes(size)

    peers = [
        WirePeer(
            read=wrong if number < num_bad else right,
            host=f"127.78.0.{number + 1}",
            bytes_per_s=8_000_000,
        )
        for number in range(num_peers)
    ]
    with (
        WirePeers(parse_metainfo(raw), peers),
        Fetch(
            kind="torrent",
            location=str(torrent),
            store=tmp_path / "store",
            peers=tuple(peer.address for peer in peers),
            timeout_s=30,
            on_progress=ignore,
            stop=threading.Event(),
        ) as fetch,
    ):
        found = fetch.download()
        assert (found / WEIGHTS).read_bytes() == content
    most = max(peer.sent_bytes for peer in peers[:num_bad])
    assert most <= MAX_PIECES * PIECE_BYTES, f"{most / PIECE_BYTES} pieces of one bad peer"
    assert sum(peer.sent_bytes for peer in peers[num_bad:]) >= NUM_BYTES
