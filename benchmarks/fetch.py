"""What a cluster takes from outside: four node processes, a seeder with a limited uplink.

    python benchmarks/fetch.py --quick

Everything runs on loopback; the seeder has an address of its own, so that nodes can shut it out.
Each node wants a fifth of the weights that all want, and a quarter of the rest. One JSON object a
case: bytes that came from outside over the distinct bytes of the plan, and the time until all
nodes have everything over what the uplink allows. The reference is the same without sharing.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from magnetar.fetcher.fetch import Fetch
from magnetar.fetcher.ownership import assign_roles
from magnetar.fetcher.piece_map import ByteRange
from magnetar.fetcher.progress import Progress
from magnetar.tests.seeder import seeding

NUM_NODES = 4
WEIGHTS = "consolidated.00.pth"
WAN_GOAL = 1.02


def shares(num_bytes: int) -> list[list[ByteRange]]:
    """What each node wants of the weights."""
    common = num_bytes // 5
    own = (num_bytes - common) // NUM_NODES
    return [
        [ByteRange(WEIGHTS, 0, common), ByteRange(WEIGHTS, common + node * own, own)]
        for node in range(NUM_NODES)
    ]


def run_node(
    number: int, magnet: str, store: str, share: list[ByteRange], pipe: Connection
) -> None:
    """One node: joins, takes its role if it gets one, fetches, and tells what went over the net."""

    def ignore(progress: Progress) -> None: ...

    with Fetch(
        kind="magnet",
        location=magnet,
        store=Path(store),
        on_progress=ignore,
        stop=threading.Event(),
        timeout_s=60,
        node=f"n{number}",
        lan_address=f"127.0.0.{11 + number}",
    ) as fetch:
        fetch.restrict(share)
        pipe.send(fetch.join())
        if (role := pipe.recv()) is not None:
            fetch.share(role)
        fetch.download()
        pipe.send(None)
        pipe.recv()
        fetch.count()
        pipe.send((fetch.wanted_bytes, fetch.received_bytes, fetch.sent_bytes))


def run_cluster(magnet: str, num_bytes: int, *, with_roles: bool) -> tuple[float, int, int]:
    """Seconds of the download, bytes from outside, and bytes that the nodes want together."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for number, share in enumerate(shares(num_bytes)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=run_node, args=(number, magnet, f"{folder}/{number}", share, theirs)
            )
            process.start()
            pipes.append(ours)
            processes.append(process)
        members = [pipe.recv() for pipe in pipes]
        roles = assign_roles(members) if with_roles else {}
        started_s = time.monotonic()
        for pipe, member in zip(pipes, members, strict=True):
            pipe.send(roles.get(member.host))
        for pipe in pipes:
            pipe.recv()
        seconds = time.monotonic() - started_s
        for pipe in pipes:
            pipe.send(None)
        amounts = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    outside = sum(received - sent for _, received, sent in amounts)
    return seconds, outside, sum(wanted for wanted, _, _ in amounts)


def say(case: str, ours: float, reference: float, goal: float) -> None:
    """One line; less is better in all cases."""
    told = {
        "case": case,
        "ours": round(ours, 4),
        "reference": round(reference, 4),
        "ratio": round(ours / reference, 4),
        "goal": goal,
        "holds": ours <= goal,
    }
    print(json.dumps(told), flush=True)


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 MB in place of 512 MB")
    num_bytes = 64_000_000 if parser.parse_args().quick else 512_000_000
    upload_bytes_per_s = num_bytes // 16
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder) / "release"
        release.mkdir()
        (release / WEIGHTS).write_bytes(random.Random(0).randbytes(num_bytes))
        (release / "tokenizer.model").write_bytes(b"t")
        (release / "params.json").write_text("{}")
        with seeding(release, listen="127.0.0.2:0", upload_bytes_per_s=upload_bytes_per_s) as seed:
            alone_s, alone, wanted = run_cluster(seed.magnet, num_bytes, with_roles=False)
            shared_s, shared, _ = run_cluster(seed.magnet, num_bytes, with_roles=True)
    say("bytes from outside over distinct bytes", shared / num_bytes, alone / num_bytes, WAN_GOAL)
    floor_s = num_bytes / upload_bytes_per_s
    say("seconds until all nodes have their share", shared_s, alone_s, 1.1 * floor_s + 5)
    print(json.dumps({"wanted_bytes": wanted, "distinct_bytes": num_bytes, "floor_s": floor_s}))


if __name__ == "__main__":
    main()
