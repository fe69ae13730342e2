"""What an agent's memory grows to with a torrent as large as Mixtral's release, all zeros.

The agent runs as it does under Ray, whose worker is loaded, in a process that fetches gigabytes
spread over the whole, goes on from what is there, and hashes 87 GiB of holes for a while.
"""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from magnetar.cluster.spec import SourceSpec
from magnetar.fetcher.piece_map import ByteRange
from magnetar.fetcher.record import Record
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent.bencode import encode
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.tests.lab.wire_peers import WirePeer, WirePeers

from .release import WEIGHTS
from .row import Row

RELEASE_BYTES: Final = 87 << 30
GOAL_MIB: Final = 300
NUM_RANGES: Final = 32
"""As experts of many layers lie apart."""
_ZEROS: Final = bytes(1 << 14)
PIECE_LENGTHS: Final = (1 << 20, 16 << 20)


class Agent:
    """A process that does what it is told, and the most memory it ever had."""

    def __init__(self, torrent: Path, store: Path, peer: str, num_bytes: int) -> None:
        command = [sys.executable, "-m", __spec__.name, str(torrent), str(store), peer]
        self._process = subprocess.Popen([*command, str(num_bytes)])

    def wait(self, timeout_s: float) -> int:
        """Until it is done, or for so long; its peak in MiB."""
        end_s = time.monotonic() + timeout_s
        peak = 0
        while time.monotonic() < end_s and self._process.poll() is None:
            peak = self._peak_mib() or peak
            time.sleep(0.05)
        self._process.kill()
        if self._process.wait() > 0:
            raise RuntimeError(f"the agent ended with {self._process.returncode}")
        return peak

    def _peak_mib(self) -> int:
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")), 0)


def memory_rows(
    scratch: Path, num_bytes: int, check_s: float, piece_lengths: Sequence[int] = PIECE_LENGTHS
) -> Iterator[Row]:
    """The peak of each piece length."""
    for piece_length in piece_lengths:
        torrent, store = scratch / f"torrent-{piece_length}", scratch / f"store-{piece_length}"
        torrent.write_bytes(zero_torrent(piece_length))
        metainfo = parse_metainfo(torrent.read_bytes())
        with WirePeers(metainfo, [WirePeer(read=zeros)]) as peers:
            address = peers.peers[0].address
            began_s = time.monotonic()
            fetching = Agent(torrent, store, address, num_bytes).wait(60)
            seconds = time.monotonic() - began_s
            resuming = Agent(torrent, store, address, num_bytes).wait(60)
            place = Store(store).release_folder(metainfo.info_hash)
            place.record.write(Record())
            checking = Agent(torrent, store, address, num_bytes).wait(check_s)
            sent_mb = peers.peers[0].sent_bytes / 1e6
        print(
            f"{metainfo.num_pieces} pieces of {piece_length >> 20} MiB: {fetching} MiB while "
            f"{sent_mb:,.0f} MB came in {seconds:.0f} s, {resuming} MiB going on, "
            f"{checking} MiB in {check_s:g} s of hashing",
            file=sys.stderr,
        )
        yield Row(
            case=f"peak memory of an agent, 87 GiB in pieces of {piece_length >> 20} MiB, MiB",
            ours=max(fetching, resuming, checking),
            reference=GOAL_MIB,
            goal=1.0,
        )


def zeros(piece: int, begin: int, size: int) -> bytes:
    """A `Read`."""
    return _ZEROS[:size]


def zero_torrent(piece_length: int) -> bytes:
    """A release of nothing but zeros."""
    sizes = {WEIGHTS: RELEASE_BYTES, "params.json": 177, "tokenizer.model": 493_443}
    total = sum(sizes.values())
    num_whole, rest = divmod(total, piece_length)
    pieces = hashlib.sha1(bytes(piece_length)).digest() * num_whole
    pieces += hashlib.sha1(bytes(rest)).digest() if rest else b""
    return encode(
        {
            b"info": {
                b"name": b"release",
                b"piece length": piece_length,
                b"pieces": pieces,
                b"files": [
                    {b"length": size, b"path": [name.encode()]} for name, size in sizes.items()
                ],
            }
        }
    )


def main(torrent: str, store: str, peer: str, num_bytes: str) -> None:
    """The agent's life up to the end of its download."""
    import ray  # noqa: F401  # its worker has it

    from magnetar.cluster.deployment.agent import NodeAgent

    agent = NodeAgent(host="n1", address="127.0.0.1", store=store, shares_lan=True)
    agent.metadata(SourceSpec(kind="torrent", location=torrent, peers=(peer,), timeout_s=60))
    size = int(num_bytes) // NUM_RANGES
    starts = [number * (RELEASE_BYTES // NUM_RANGES) for number in range(NUM_RANGES)]
    agent.restrict(tuple(ByteRange(WEIGHTS, start, size) for start in starts))
    agent.join()
    agent.download()
    agent.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
