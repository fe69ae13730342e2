"""What fetching costs: the wide network, other clients, crashes, liars, memory, verifying.

    python benchmarks/fetch.py --quick                      every case, small
    python benchmarks/fetch.py --case cluster --case clients
    python benchmarks/fetch.py --output results/DATE-fetch.jsonl

Prints what was seen on stderr and one JSON object for each case on stdout. The clusters need
root for network namespaces, and `clients` needs aria2c. When layers can be loaded and the time
from the last byte to the first token are measured by `loading.py`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from magnetar.benchmarks.fetching.clients import client_rows, has_aria2c
from magnetar.benchmarks.fetching.cluster import cluster_rows
from magnetar.benchmarks.fetching.crashes import crash_rows
from magnetar.benchmarks.fetching.garbage import garbage_rows
from magnetar.benchmarks.fetching.memory import memory_rows
from magnetar.benchmarks.fetching.row import Row
from magnetar.benchmarks.fetching.verifying import verify_rows
from magnetar.benchmarks.up import machine

MB = 1_000_000
EVEN = (4 * MB,) * 4
UNEVEN = (8 * MB, 4 * MB, 4 * MB, 2 * MB)

Case = Callable[[Path], Iterator[Row]]


def cases(*, quick: bool) -> Mapping[str, Case]:
    """By name."""
    num_bytes = 96 * MB if quick else 256 * MB
    rounds = 2 if quick else 5
    return {
        "cluster": lambda scratch: cluster_rows(scratch, num_bytes, EVEN, are_known=False),
        "cluster-uneven": lambda scratch: cluster_rows(scratch, num_bytes, UNEVEN, are_known=True),
        "cluster-untold": lambda scratch: cluster_rows(scratch, num_bytes, UNEVEN, are_known=False),
        "clients": lambda scratch: client_rows(scratch, 512 * MB, rounds),
        "verify": lambda scratch: verify_rows(scratch, 1000 * MB, rounds + 1),
        "garbage": lambda scratch: garbage_rows(
            scratch, 128 * MB, num_peers=64, num_bad=16, most_sent=1.5
        ),
        "garbage-most": lambda scratch: garbage_rows(
            scratch, 64 * MB, num_peers=24, num_bad=20, most_sent=1.6
        ),
        "garbage-all-but-one": lambda scratch: garbage_rows(
            scratch, 24 * MB, num_peers=24, num_bad=23, most_sent=3.0
        ),
        "memory": lambda scratch: memory_rows(
            scratch, 512 * MB if quick else 2_000 * MB, 5.0 if quick else 12.0
        ),
        "crashes": lambda scratch: crash_rows(scratch, 128 * MB),
    }


def main() -> None:
    """Runs the cases."""
    names = tuple(cases(quick=True))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--case", action="append", choices=names, help="this one alone; repeatable")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    given = parser.parse_args()
    chosen = given.case or names
    if "clients" in chosen and not has_aria2c():
        raise SystemExit("aria2c is missing: apt-get install aria2, or name other cases")
    lines = [json.dumps(machine() | {"quick": given.quick})]
    for name in chosen:
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="magnetar-fetch-") as scratch:
            for row in cases(quick=given.quick)[name](Path(scratch)):
                lines.append(json.dumps(row.to_json()))
                print(lines[-1], flush=True)
        print(f"{name}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
