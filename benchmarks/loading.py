"""What loading while downloading is worth, and what it costs to check weights as they are loaded.

    python benchmarks/loading.py --quick       96 MB, three rounds
    python benchmarks/loading.py               256 MB; --demo STORE adds the demo
    python benchmarks/loading.py --demo STORE --case demo      that case alone

Three seeds on loopback, whose uplinks bring 256 MB in 20 s, share eight equal layers that lie out
of order in one file; a fetch brings them in the order in which stages load them, and without an
order, in turns. The demo comes from one seed of 40 MB/s, so that the network is the slower part.
Then the same bytes are read back: as they are, checked against the hashes of their pieces, and
against their own SHA-256; and verified as `magnetar verify` does, beside a plain SHA-1.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from magnetar.benchmarks.fetching.row import Row
from magnetar.benchmarks.up import machine
from magnetar.fetcher.checkpoint.checked_files import CheckedFiles
from magnetar.fetcher.demo.build import build_demo_release
from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.file_bytes import read_exactly
from magnetar.fetcher.piece_map import ByteRange
from magnetar.fetcher.progress import Progress
from magnetar.fetcher.record import Record
from magnetar.fetcher.store import Store
from magnetar.fetcher.tensors import TensorEntry
from magnetar.tests.seeder import seeding

CASES = ("order", "check", "demo")
WEIGHTS = "consolidated.00.pth"
NUM_LAYERS = 8
NUM_SEEDS = 3
DEMO_BYTES_PER_S = 40_000_000
IN_FILE = (3, 0, 7, 4, 1, 6, 2, 5)
"""The order of the layers in the file."""


def layers(num_bytes: int) -> list[TensorEntry]:
    """Eight tensors of equal size, by layer."""
    size = num_bytes // NUM_LAYERS
    return [
        TensorEntry(
            name=f"layers.{layer}.w",
            source_name="w",
            file=WEIGHTS,
            offset=IN_FILE.index(layer) * size,
            dtype="bf16",
            shape=(size // 2,),
        )
        for layer in range(NUM_LAYERS)
    ]


def write_release(folder: Path, num_bytes: int) -> None:
    """Noise with the names of a release."""
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(random.Random(0).randbytes(num_bytes))
    (folder / "tokenizer.model").write_bytes(b"t")
    (folder / "params.json").write_text("{}")


@contextmanager
def seeds(folder: Path, upload_bytes_per_s: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A magnet link and its seeds, which share this upload."""
    with ExitStack() as stack:
        infos = [
            stack.enter_context(seeding(folder, upload_bytes_per_s=upload_bytes_per_s // NUM_SEEDS))
            for _ in range(NUM_SEEDS)
        ]
        yield infos[0].magnet, tuple(info.address for info in infos)


def fetching(magnet: str, store: Path, peers: tuple[str, ...] = ()) -> Fetch:
    """One fetch of it."""

    def ignore(progress: Progress) -> None: ...

    return Fetch(
        kind="magnet",
        location=magnet,
        store=store,
        peers=peers,
        on_progress=ignore,
        stop=threading.Event(),
        timeout_s=60,
    )


def ready_times(
    magnet: str, peers: tuple[str, ...], entries: list[TensorEntry], *, in_order: bool
) -> list[float]:
    """Seconds until each layer could be read, then until the fetch was over."""
    ranges = [[ByteRange(entry.file, entry.offset, entry.num_bytes)] for entry in entries]
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as thread,
        fetching(magnet, Path(folder), peers) as fetch,
    ):
        if in_order:
            fetch.order(ranges)
        fetch.metadata()
        began = time.monotonic()
        done = thread.submit(fetch.download)
        times = []
        for part in ranges:
            while not fetch.wait(part, 1.0):
                if done.done():
                    done.result()
            times.append(time.monotonic() - began)
        done.result()
        return [*times, time.monotonic() - began]


def order_rows(release: Path, num_bytes: int, rounds: int) -> list[Row]:
    """Layers in order beside layers in whatever order."""
    entries = layers(num_bytes)
    with seeds(release, num_bytes // 20) as (magnet, peers):
        found: dict[bool, list[list[float]]] = {True: [], False: []}
        for _ in range(rounds):
            for in_order in (True, False):
                times = ready_times(magnet, peers, entries, in_order=in_order)
                found[in_order].append(times)
                shown = " ".join(f"{seconds:5.2f}" for seconds in times)
                print(f"{'in order' if in_order else 'any order'}: {shown}", file=sys.stderr)
    first = statistics.median(times[0] for times in found[True])
    whole = statistics.median(times[-1] for times in found[True])
    any_order = statistics.median(times[-1] for times in found[False])
    return [
        Row(case="first of 8 layers ready over whole time", ours=first, reference=whole, goal=0.2),
        Row(case="whole time over unordered", ours=whole, reference=any_order, goal=1.02),
    ]


def best(work: Callable[[], object], rounds: int) -> float:
    """The shortest of a few runs in seconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def check_rows(release: Path, num_bytes: int, rounds: int) -> list[Row]:
    """Reading and verifying the same bytes in several ways; rates in GB/s."""
    entries = layers(num_bytes)
    buffer = memoryview(bytearray(entries[0].num_bytes))
    with tempfile.TemporaryDirectory() as folder, seeding(release) as seed:
        store = Path(folder)
        with fetching(seed.magnet, store) as fetch:
            path = fetch.download() / WEIGHTS
            unknown = fetch.load_checks()
            first = CheckedFiles(unknown)
            for entry in entries:
                first.read_into(entry, buffer)
            fetch.keep_sums(first.found)
            known = fetch.load_checks()

        def read_with(read: Callable[[TensorEntry], None]) -> Callable[[], None]:
            def work() -> None:
                for entry in entries:
                    read(entry)

            return work

        def plain(entry: TensorEntry) -> None:
            read_exactly(path, entry.offset, buffer)

        def by_pieces(entry: TensorEntry) -> None:
            CheckedFiles(unknown).read_into(entry, buffer)

        def by_sum(entry: TensorEntry) -> None:
            CheckedFiles(known).read_into(entry, buffer)

        def sha1() -> None:
            digest = hashlib.sha1()
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)

        def verify() -> None:
            assert seed.info_hash is not None
            Store(store).release_folder(seed.info_hash).record.write(Record())
            with fetching(seed.magnet, store) as fetch:
                fetch.verify()

        size = num_bytes / 1e9
        rate = {
            name: size / best(work, rounds)
            for name, work in (
                ("plain", read_with(plain)),
                ("pieces", read_with(by_pieces)),
                ("sums", read_with(by_sum)),
                ("sha1", sha1),
                ("verify", verify),
            )
        }
    print(" ".join(f"{name} {each:.2f} GB/s" for name, each in rate.items()), file=sys.stderr)
    return [
        Row(
            case="verify over a plain SHA-1, GB/s",
            ours=rate["verify"],
            reference=rate["sha1"],
            goal=0.8,
            is_floor=True,
        ),
        Row(
            case="reading checked by pieces over a plain SHA-1, GB/s",
            ours=rate["pieces"],
            reference=rate["sha1"],
            goal=0.4,
            is_floor=True,
        ),
        Row(
            case="reading checked by SHA-256 over a plain SHA-1, GB/s",
            ours=rate["sums"],
            reference=rate["sha1"],
            goal=0.7,
            is_floor=True,
        ),
    ]


def demo_rows(store: Path) -> list[Row]:
    """From the last piece of the demo model to its first token, in seconds."""

    def ignore(progress: Progress) -> None: ...

    stop = threading.Event()
    release = build_demo_release(store / "demo" / "smollm2-moe", on_progress=ignore, stop=stop)
    ended: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        seeding(release, upload_bytes_per_s=DEMO_BYTES_PER_S) as seed,
    ):
        command = [sys.executable, "-m", "magnetar.cli", "up", seed.magnet, "--progress", "json"]
        command += ["--peer", seed.address, "--port", "0", "--store", folder]
        with subprocess.Popen(
            command,
            env=os.environ | {"MAGNETAR_HOME": f"{folder}/home"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                event = json.loads(line)
                if event.get("finished") and event["phase"] not in ended:
                    ended[event["phase"]] = time.monotonic()
                if event["event"] in ("ready", "error"):
                    print(event, file=sys.stderr)
                    break
            process.send_signal(signal.SIGINT)
            process.communicate()
    phases = ((phase, at_s - ended["download"]) for phase, at_s in ended.items())
    shown = ", ".join(f"{phase} {after_s:+.2f}" for phase, after_s in phases)
    print(f"phases end, seconds after the download: {shown}", file=sys.stderr)
    waited = ended["warm"] - ended["download"]
    return [
        Row(case="last byte to first token of the demo, s", ours=waited, reference=1.0, goal=3.0)
    ]


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="96 MB in place of 256 MB")
    parser.add_argument(
        "--demo",
        type=Path,
        metavar="STORE",
        help="also the demo, whose model is made in this store",
    )
    parser.add_argument("--case", action="append", choices=CASES, help="this one alone; repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    args = parser.parse_args()
    chosen = args.case or (CASES if args.demo else CASES[:-1])
    if "demo" in chosen and not args.demo:
        parser.error("the demo needs --demo STORE")
    num_bytes = 96_000_000 if args.quick else 256_000_000
    lines: list[str] = []

    def keep(rows: list[Row]) -> None:
        for row in rows:
            lines.append(json.dumps(row.to_json()))
            print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder) / "release"
        write_release(release, num_bytes)
        if "order" in chosen:
            keep(order_rows(release, num_bytes, args.rounds))
        if "check" in chosen:
            keep(check_rows(release, num_bytes, args.rounds))
    if "demo" in chosen:
        keep(demo_rows(args.demo))
    if args.output:
        args.output.write_text(
            "\n".join([json.dumps(machine() | {"quick": args.quick}), *lines]) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
