"""Nodes of the lab that fetch one release together, as the nodes of a deployment do."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from magnetar.cluster.deployment.foreman import Foreman
from magnetar.cluster.spec import SourceSpec
from magnetar.fetcher.piece_map import ByteRange
from magnetar.fetcher.torrent.lending import Lender

from .network import Place
from .node import Node

POLL_S = 0.1
DOWNLOAD_S = 60.0

Share = tuple[ByteRange, ...] | None
"""Bytes of the weights that a node wants; None: all."""


class LabCluster:
    """Node processes, and what the controller does with them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        # Loopback has a way out everywhere; only a user could say otherwise.
        self._inside = {node.host: 0.0 for node in nodes if node.place.wan is None}
        self.nodes = {node.host: node for node in nodes}
        self.foreman = Foreman(self._call)
        self.lenders: tuple[Lender, ...] = ()
        self._counted_before = 0

    def prepare(
        self,
        source: SourceSpec,
        shares: Mapping[str, Share],
        *,
        sources: Mapping[str, SourceSpec] | None = None,
        lenders: tuple[Lender, ...] = (),
    ) -> None:
        """Lets each node learn what the release is from the first, and say what it wants.

        `sources` are those of hosts that know others than `source` names. `lenders` hold something
        already.
        """
        self.lenders = lenders
        self._counted_before = self._counted()
        first, *others = self.nodes.values()
        first.call("metadata", source, None, lenders)
        torrent = first.call("torrent")
        self._call(
            "metadata",
            {
                node.host: ((sources or {}).get(node.host, source), torrent, lenders)
                for node in others
            },
        )
        for host, share in shares.items():
            self.nodes[host].call("restrict", share)

    def find_lenders(self, other: "LabCluster", info_hash: str) -> None:
        """Takes what nodes of another cluster hold, or are bringing, from them."""
        hosts = tuple(node.place.lan for node in self.nodes.values())
        found = other.all("lend", info_hash, hosts).values()
        self.lenders = tuple(lender for lender in found if lender is not None)

    def divide(self, *, wan_mbps: Mapping[str, float] | None = None) -> None:
        """Opens the torrents to each other and hands out the work."""
        self.foreman = Foreman(
            self._call,
            wan_mbps=self._inside | dict(wan_mbps or {}),
            lenders=lambda: [lender.member() for lender in self.lenders],
        )
        self.foreman.divide(self.all("join"))

    def download(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Brings to each node that stays alive what it wants, and checks it."""
        running = {host: node.start("download") for host, node in self.nodes.items()}
        deadline_s = time.monotonic() + DOWNLOAD_S
        while running and time.monotonic() < deadline_s:
            wait(running.values(), timeout=POLL_S, return_when=FIRST_COMPLETED)
            for host in [host for host, future in running.items() if future.done()]:
                future = running.pop(host)
                if self.nodes[host].is_alive():
                    future.result()
            for host in self.foreman.look() - running.keys():
                running[host] = self.nodes[host].start("download")
            if meanwhile is not None:
                meanwhile()
        assert not running, f"{', '.join(running)} did not end"
        self.all("verify")

    def outside_bytes(self) -> int:
        """Payload that came from outside since the start: received, and sent by no other node."""
        fetched = self.all("fetched").values()
        return sum(share.received_bytes - share.sent_bytes for share in fetched)

    def counted_bytes(self) -> int | None:
        """The same since `prepare` by the kernel, headers and all; None where it counts nothing."""
        counted = self._counted()
        return counted - self._counted_before if counted else None

    def all(self, method: str, *arguments: object) -> dict[str, Any]:
        """Calls a method on every living node at once."""
        return self._call(method, dict.fromkeys(self.nodes, arguments))

    def _call(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """A `Crew`."""
        asked = {
            host: self.nodes[host].start(method, *of_host)
            for host, of_host in arguments.items()
            if self.nodes[host].is_alive()
        }
        answers = {}
        for host, future in asked.items():
            try:
                answers[host] = future.result(60)
            except ConnectionError:
                continue  # It died under way.
        return answers

    def _counted(self) -> int:
        places = [node.place for node in self.nodes.values()]
        return sum(place.outside_bytes() for place in places if place.prefix and place.wan)


@contextlib.contextmanager
def lab_cluster(places: Sequence[Place], store: Path) -> Iterator[LabCluster]:
    """Nodes at these places, each with a store of its own below `store`."""
    with ThreadPoolExecutor(len(places)) as pool:
        nodes = list(pool.map(lambda place: Node(place, store / place.name), places))
        try:
            yield LabCluster(nodes)
        finally:
            # At once: a session takes a second to end.
            list(pool.map(Node.close, nodes))
