"""Measure every node of a Ray cluster, and what lies between them."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...settings import default_store
from ..inventory.inventory import probe_node
from ..inventory.link_cache import remembered_links
from ..inventory.link_probe import Echo, probe_link
from ..inventory.measure import Gauge, measure_speeds
from ..machines import Inventory, Link, Node
from .ray_calls import gather
from .ray_runtime import RayNode

TIMEOUT_S: Final = 120.0


class NodeProbe:
    """Runs as a Ray actor, one on each node while a cluster is surveyed."""

    def __init__(self, node: RayNode, store: str, gauge: type[Gauge]) -> None:
        self._node = node
        self._gauge = gauge
        self._store = Path(store.replace("{host}", node.host)).expanduser()
        self._echo: Echo | None = None

    def measure(self, *, again: bool) -> Node:
        """This machine with its speeds, bounded by what its owner gave to Ray."""
        node = probe_node(
            self._node.host,
            self._node.address,
            self._store,
            memory_limit_bytes=self._node.memory_bytes,
            cpu_limit=self._node.num_cpus,
        )
        return measure_speeds(node, self._gauge(), again=again)

    def listen(self, secret: bytes) -> str:
        """Answer the probes of other nodes from now on; the address."""
        self._echo = Echo(host=self._node.address, secret=secret)
        return self._echo.address

    def probe(self, target: str, address: str, secret: bytes) -> Link:
        """The link from here to another node that listens."""
        return probe_link(self._node.host, target, address, secret=secret)


def survey(nodes: Sequence[RayNode], gauge: type[Gauge], *, again: bool = False) -> Inventory:
    """Measure the nodes of the cluster that is connected; blocks for some seconds.

    `gauge` must be importable by name on every node. Speeds are measured everywhere at once, links
    in rounds in which every node has one partner. What was measured before is not measured again,
    unless `again`.

    Raises:
        MagnetarError: a node could not be measured or reached.
    """
    import ray

    actor = ray.remote(NodeProbe)
    hosts = [node.host for node in nodes]
    who = f"the probe on {', '.join(hosts)}"
    probes: dict[str, Any] = {}
    try:
        for node in nodes:
            options = {"num_cpus": 0, "label_selector": node.selector}
            probes[node.host] = actor.options(**options).remote(node, str(default_store()), gauge)
        found = gather(
            [probe.measure.remote(again=again) for probe in probes.values()],
            who=who,
            timeout_s=TIMEOUT_S,
        )
        secret = secrets.token_bytes(32)
        listening = [probe.listen.remote(secret) for probe in probes.values()]
        addresses = dict(zip(hosts, gather(listening, who=who, timeout_s=TIMEOUT_S), strict=True))
        links: list[Link] = [] if again else list(remembered_links(found))
        known = {frozenset((link.source, link.target)) for link in links}
        for pairs in ([(host, host) for host in hosts], *rounds(hosts)):
            calls = [
                probes[a].probe.remote(b, addresses[b], secret)
                for a, b in pairs
                if frozenset((a, b)) not in known
            ]
            links += gather(calls, who=who, timeout_s=TIMEOUT_S)
    finally:
        for probe in probes.values():
            ray.kill(probe)
    return Inventory(nodes=tuple(found), links=tuple(links))


def rounds(hosts: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds in which nobody is asked twice (a round-robin tournament)."""
    circle: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle.insert(1, circle.pop())
    return found
