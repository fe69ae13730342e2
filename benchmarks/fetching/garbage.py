"""A download from many peers, of which some send what they like."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.tests.lab.wire_peers import Read, WirePeer, WirePeers

from .release import WEIGHTS, Client, write_release
from .row import Row

NUM_PEERS, NUM_BAD = 64, 16
PEER_BYTES_PER_S: Final = 1_000_000
MAX_PIECES: Final = 3
"""What a bad peer may have sent before it is shut out, in pieces: a few."""


def garbage_rows(scratch: Path, num_bytes: int) -> Iterator[Row]:
    """What bad peers could do."""
    release, store = scratch / "release", scratch / "store"
    metainfo = parse_metainfo(raw := write_release(release, num_bytes))
    torrent = scratch / "torrent"
    torrent.write_bytes(raw)
    content = b"".join((scratch / file.path).read_bytes() for file in metainfo.files)

    def right(piece: int, begin: int, size: int) -> bytes:
        start = piece * metainfo.piece_length + begin
        return content[start : start + size]

    def noise(piece: int, begin: int, size: int) -> bytes:
        return os.urandom(size)

    def one_wrong_byte(piece: int, begin: int, size: int) -> bytes:
        block = bytearray(right(piece, begin, size))
        block[size // 2] ^= 1
        return bytes(block)

    def read(number: int) -> Read:
        if number >= NUM_BAD:
            return right
        return noise if number % 2 else one_wrong_byte

    # libtorrent bans addresses, so each peer has its own.
    peers = [
        WirePeer(read=read(number), host=f"127.79.0.{number + 1}", bytes_per_s=PEER_BYTES_PER_S)
        for number in range(NUM_PEERS)
    ]
    with WirePeers(metainfo, peers):
        client = Client(torrent, store, [peer.address for peer in peers])
        client.wait_until_checked()
        client.wait()
    found = store / "releases" / metainfo.info_hash / "data" / "release" / WEIGHTS
    is_same = found.read_bytes() == (release / WEIGHTS).read_bytes()
    pieces = sorted(len(peer.sent) for peer in peers[:NUM_BAD])
    most = max(peer.sent_bytes for peer in peers[:NUM_BAD]) / metainfo.piece_length
    sent_bytes = sum(peer.sent_bytes for peer in peers)
    bad_bytes = sum(peer.sent_bytes for peer in peers[:NUM_BAD])
    shown = " ".join(map(str, pieces))
    print(
        f"pieces touched by each bad peer: {shown} of {metainfo.num_pieces}; "
        f"bad {bad_bytes / 1e6:.1f} MB, sent again {(sent_bytes - num_bytes) / 1e6:.1f} MB of "
        f"{num_bytes / 1e6:.0f}; identical: {is_same}",
        file=sys.stderr,
    )
    yield Row(
        case="16 of 64 peers send garbage: most that one of them sent, in pieces",
        ours=most if is_same else metainfo.num_pieces,
        reference=1.0,
        goal=MAX_PIECES,
    )
    yield Row(
        case="16 of 64 peers send garbage: bytes sent over the release",
        ours=sent_bytes,
        reference=num_bytes,
        goal=1.25,
    )
