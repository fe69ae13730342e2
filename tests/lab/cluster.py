"""Nodes of the lab that fetch one release together, as the nodes of a deployment do."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from magnetar.cluster.spec import SourceSpec
from magnetar.fetcher.ownership import assign_roles
from magnetar.fetcher.piece_map import ByteRange

from .network import Place
from .node import Node

Share = tuple[ByteRange, ...] | None
"""Bytes of the weights that a node wants; None: all."""


class LabCluster:
    """Node processes, and what the controller does with them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.host: node for node in nodes}
        self._counted_before = 0

    def prepare(self, source: SourceSpec, shares: Mapping[str, Share]) -> None:
        """Lets each node learn what the release is, and say what it wants."""
        self.all("metadata", source)
        for host, share in shares.items():
            self.nodes[host].call("restrict", share)

    def divide(self) -> None:
        """Opens the torrents to each other and hands out the work; counts from here."""
        self._counted_before = self._counted()
        roles = assign_roles(tuple(self.all("join").values()))
        for host, role in roles.items():
            self.nodes[host].call("share", role)

    def download(self) -> None:
        """Brings to each node what it wants, and checks it."""
        self.all("download")
        self.all("verify")

    def outside_bytes(self) -> int:
        """Payload that came from outside since the start: received, and sent by no other node."""
        fetched = self.all("fetched").values()
        return sum(share.received_bytes - share.sent_bytes for share in fetched)

    def counted_bytes(self) -> int | None:
        """The same since `divide` by the kernel, headers and all; None where it counts nothing."""
        counted = self._counted()
        return counted - self._counted_before if counted else None

    def all(self, method: str, *arguments: object) -> dict[str, Any]:
        """Calls a method on every node at once."""
        asked: dict[str, Future[Any]] = {
            host: node.start(method, *arguments) for host, node in self.nodes.items()
        }
        return {host: future.result(60) for host, future in asked.items()}

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
        for node in nodes:
            node.close()
