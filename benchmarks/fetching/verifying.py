"""Verifying what lies on the disk, beside a plain SHA-1 of the same bytes on one core each."""

import hashlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.record import Record
from magnetar.fetcher.store import Store
from magnetar.fetcher.torrent.metainfo import parse_metainfo

from .release import WEIGHTS, ignore, write_release
from .row import Row

CHUNK_BYTES = 1 << 20


def verify_rows(scratch: Path, num_bytes: int, rounds: int) -> Iterator[Row]:
    """Takes turns; the torrent session has as many hashing threads as there are cores."""
    raw = write_release(scratch / "release", num_bytes)
    torrent = scratch / "torrent"
    torrent.write_bytes(raw)
    place = Store(scratch / "store").release_folder(parse_metainfo(raw).info_hash)
    place.data.mkdir(parents=True)
    (scratch / "release").rename(place.data / "release")
    weights = place.data / "release" / WEIGHTS

    def sha1() -> None:
        digest = hashlib.sha1()
        with weights.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)

    def verify() -> None:
        place.record.write(Record())
        with Fetch(
            kind="torrent",
            location=str(torrent),
            store=scratch / "store",
            peers=("127.0.0.1:9",),
            timeout_s=5,
            on_progress=ignore,
            stop=threading.Event(),
        ) as fetch:
            fetch.verify()
            assert fetch.hashed_bytes >= num_bytes

    cores = os.sched_getaffinity(0)
    times: dict[Callable[[], None], list[float]] = {sha1: [], verify: []}
    os.sched_setaffinity(0, {min(cores)})
    try:
        for _ in range(rounds):
            for work, taken in times.items():
                began_s = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began_s)
    finally:
        os.sched_setaffinity(0, cores)
    rates = {work: num_bytes / 1e9 / statistics.median(taken) for work, taken in times.items()}
    print(f"verify {rates[verify]:.2f} GB/s, sha1 {rates[sha1]:.2f} GB/s", file=sys.stderr)
    yield Row(
        case="verify over a plain SHA-1 on one core, GB/s",
        ours=rates[verify],
        reference=rates[sha1],
        goal=0.8,
        is_floor=True,
    )
