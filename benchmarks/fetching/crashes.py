"""A client that is killed at random moments and started again, until it has everything."""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.tests.lab.wire_peers import WirePeer, WirePeers

from .release import WEIGHTS, Client, write_release
from .row import Row

NUM_KILLS: Final = 20
SHORTEST_S, LONGEST_S = 0.2, 2.0
"""How long a client lives: from before it has a session to well into its download."""
GOAL_BYTES: Final = 8 << 20
HASHED_GOAL: Final = 0.25


class Source:
    """The bytes of a file, and how many were asked for again since the last `take`."""

    def __init__(self, content: bytes, piece_length: int) -> None:
        self._content = content
        self._piece_length = piece_length
        self._seen: set[tuple[int, int]] = set()
        self._again_bytes = 0

    def read(self, piece: int, begin: int, size: int) -> bytes:
        """A `Read`."""
        if (piece, begin) in self._seen:
            self._again_bytes += size
        self._seen.add((piece, begin))
        start = piece * self._piece_length + begin
        return self._content[start : start + size]

    def take(self) -> int:
        """The count, which begins anew."""
        taken, self._again_bytes = self._again_bytes, 0
        return taken


def crash_rows(scratch: Path, num_bytes: int) -> Iterator[Row]:
    """Kills it, and says what each kill cost at most."""
    release, store = scratch / "release", scratch / "store"
    metainfo = parse_metainfo(raw := write_release(release, num_bytes))
    torrent = scratch / "torrent"
    torrent.write_bytes(raw)
    content = b"".join((scratch / file.path).read_bytes() for file in metainfo.files)
    source = Source(content, metainfo.piece_length)
    chance = random.Random(1)
    again: list[int] = []
    # The kills together leave some of it for the last client.
    rate = int(num_bytes / (NUM_KILLS * LONGEST_S / 2))
    with WirePeers(metainfo, [WirePeer(read=source.read, bytes_per_s=rate)]) as peers:
        address = peers.peers[0].address
        for _ in range(NUM_KILLS):
            client = Client(torrent, store, [address])
            time.sleep(chance.uniform(SHORTEST_S, LONGEST_S))
            assert client.process.poll() is None, "it had everything before it was killed"
            client.kill()
            again.append(source.take())
        client = Client(torrent, store, [address])
        read_bytes = client.wait_until_checked()["read_bytes"]
        client.wait()
        again.append(source.take())
    found = store / "releases" / metainfo.info_hash / "data" / "release" / WEIGHTS
    is_same = found.read_bytes() == (release / WEIGHTS).read_bytes()
    shown = " ".join(f"{each / 1e6:.1f}" for each in again)
    print(f"fetched again after each kill, MB: {shown}; identical: {is_same}", file=sys.stderr)
    # A client fetches again what the kill before it lost.
    yield Row(
        case="most bytes fetched again after one of 20 kills",
        ours=max(again) if is_same else num_bytes,
        reference=GOAL_BYTES,
        goal=1.0,
    )
    yield Row(
        case="bytes read back after a kill over the whole",
        ours=read_bytes,
        reference=num_bytes,
        goal=HASHED_GOAL,
    )
