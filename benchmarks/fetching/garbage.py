"""A download from many peers, of which some send what they like."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.tests.lab.wire_peers import Read, WirePeer, WirePeers

from .release import WEIGHTS, Client, write_release
from .row import Row

PEER_BYTES_PER_S: Final = 1_000_000
MAX_PIECES: Final = 3
"""What a bad peer may have sent before it is shut out, in pieces: a few."""


def garbage_rows(
    scratch: Path, num_bytes: int, *, num_peers: int, num_bad: int, most_sent: float
) -> Iterator[Row]:
    """What bad peers could do; `most_sent`: what all may send, over the release."""
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
        if number >= num_bad:
            return right
        return noise if number % 2 else one_wrong_byte

    # libtorrent bans addresses, so each peer has its own.
    peers = [
        WirePeer(read=read(number), host=f"127.79.0.{number + 1}", bytes_per_s=PEER_BYTES_PER_S)
        for number in range(num_peers)
    ]
    began_s = time.monotonic()
    with WirePeers(metainfo, peers):
        client = Client(torrent, store, [peer.address for peer in peers])
        client.wait_until_checked()
        client.wait()
        seconds = time.monotonic() - began_s
    found = store / "releases" / metainfo.info_hash / "data" / "release" / WEIGHTS
    is_same = found.read_bytes() == (release / WEIGHTS).read_bytes()
    pieces = sorted(len(peer.sent) for peer in peers[:num_bad])
    most = max(peer.sent_bytes for peer in peers[:num_bad]) / metainfo.piece_length
    sent_bytes = sum(peer.sent_bytes for peer in peers)
    bad_bytes = sum(peer.sent_bytes for peer in peers[:num_bad])
    shown = " ".join(map(str, pieces))
    floor_s = num_bytes / PEER_BYTES_PER_S / (num_peers - num_bad)
    print(
        f"{seconds:.1f} s; the honest alone would take {floor_s:.1f} s; "
        f"pieces touched by each bad peer: {shown} of {metainfo.num_pieces}; "
        f"bad {bad_bytes / 1e6:.1f} MB, sent again {(sent_bytes - num_bytes) / 1e6:.1f} MB of "
        f"{num_bytes / 1e6:.0f}; identical: {is_same}",
        file=sys.stderr,
    )
    yield Row(
        case=f"{num_bad} of {num_peers} peers send garbage: most that one of them sent, in pieces",
        ours=most if is_same else metainfo.num_pieces,
        reference=1.0,
        goal=MAX_PIECES,
    )
    yield Row(
        case=f"{num_bad} of {num_peers} peers send garbage: bytes sent over the release",
        ours=sent_bytes,
        reference=num_bytes,
        goal=most_sent,
    )
