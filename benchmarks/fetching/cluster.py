"""Four nodes that fetch one release together, each over an uplink of its own.

Two stages of four layers, each on two nodes that have one half of every layer's experts: about a
fifth of the bytes are attention and embeddings, which two or four nodes need. Uplinks are shaped
where network namespaces are allowed; elsewhere only what crosses them is counted.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from magnetar.cluster.spec import SourceSpec
from magnetar.fetcher.piece_map import ByteRange, PieceMap
from magnetar.fetcher.torrent.metainfo import parse_metainfo
from magnetar.tests.lab.cluster import lab_cluster
from magnetar.tests.lab.network import network
from magnetar.tests.seeder import seeding

from .release import WEIGHTS, write_release
from .row import Row

HOSTS: Final = ("n1", "n2", "n3", "n4")
NUM_LAYERS, NUM_EXPERTS = 8, 8
SHARED: Final = 0.2
WAN_GOAL: Final = 1.02


def shares(num_bytes: int) -> dict[str, tuple[ByteRange, ...]]:
    """What each node wants of the weights of an imagined release."""
    embeddings = int(num_bytes * SHARED / 4)
    layer = (num_bytes - embeddings) // NUM_LAYERS
    attention = int(num_bytes * SHARED * 3 / 4) // NUM_LAYERS
    experts = layer - attention
    found = {}
    for number, host in enumerate(HOSTS):
        stage, half = divmod(number, 2)
        ranges = [ByteRange(WEIGHTS, 0, embeddings)]
        for index in range(stage * NUM_LAYERS // 2, (stage + 1) * NUM_LAYERS // 2):
            start = embeddings + index * layer
            ranges.append(ByteRange(WEIGHTS, start, attention))
            ranges.append(ByteRange(WEIGHTS, start + attention + half * experts // 2, experts // 2))
        found[host] = tuple(ranges)
    return found


def cluster_rows(
    scratch: Path, num_bytes: int, uplinks: Sequence[int], *, are_known: bool
) -> Iterator[Row]:
    """`uplinks` in bytes per second, of each node; `are_known`: the cluster was told of them."""
    write_release(scratch / "release", num_bytes)
    with network() as lab, tempfile.TemporaryDirectory(dir=scratch) as store:
        outside = lab.host("seed", is_outside=True)
        with seeding(scratch / "release", listen=f"{outside.wan}:0", prefix=outside.prefix) as seed:
            places = [
                lab.host(host, down_bytes_per_s=rate)
                for host, rate in zip(HOSTS, uplinks, strict=True)
            ]
            source = SourceSpec(kind="magnet", location=seed.magnet, timeout_s=60)
            with lab_cluster(places, Path(store)) as nodes:
                nodes.prepare(source, shares(num_bytes))
                rates = {h: rate / 1e6 for h, rate in zip(HOSTS, uplinks, strict=True)}
                nodes.divide(wan_mbps=rates if are_known else None)
                roles = dict(nodes.foreman.roles)
                began_s = time.monotonic()
                nodes.download()
                seconds = time.monotonic() - began_s
                crossed, counted = nodes.outside_bytes(), nodes.counted_bytes()
                wanted = {host: nodes.nodes[host].call("member").wanted for host in HOSTS}
    piece_map = PieceMap.of_torrent(parse_metainfo(seed.torrent), root="release/")
    unique = piece_map.num_bytes(frozenset().union(*wanted.values()))
    floor_s = max(
        piece_map.num_bytes(roles[host].owned) / rate
        for host, rate in zip(HOSTS, uplinks, strict=True)
    )
    together_s = unique / sum(uplinks)
    shown = "/".join(f"{rate / 1e6:g}" for rate in uplinks)
    told = f"{shown} MB/s{'' if are_known else ', of which nobody was told'}"
    carried = piece_map.num_bytes(piece for role in roles.values() for piece in role.carried.pieces)
    print(
        f"{told}: {seconds:.1f} s; the longest share takes {floor_s:.1f} s, all uplinks together "
        f"{together_s:.1f} s; {crossed / unique:.4f} of the bytes, by the cards "
        f"{(counted or 0) / unique:.4f}; {carried / unique:.2f} of them carried for others",
        file=sys.stderr,
    )
    yield Row(
        case=f"bytes from outside over distinct ones, {told}",
        ours=crossed,
        reference=unique,
        goal=WAN_GOAL,
    )
    yield Row(
        case=f"seconds over the longest share of an uplink, {told}",
        ours=seconds,
        reference=floor_s,
        goal=(1.1 * floor_s + 5) / floor_s,
    )
    if are_known:
        yield Row(
            case=f"seconds over all uplinks together, {told}",
            ours=seconds,
            reference=together_s,
            goal=(together_s + 5) / together_s,
        )
