"""Whether an inventory can be that of machines: no plan is made of numbers that cannot be."""

from collections.abc import Iterator

from ...errors import InventoryError
from ..machines import Device, Inventory, Link, Node

MOST_BYTES = 1 << 47
"""Of memory: 140 terabytes. Whoever has more probably gave bytes for gigabytes."""
MOST_DISK_BYTES = 1 << 63
"""Network file systems say what they like."""
MOST_GBPS = 1e5
"""Gigabytes per second: ten times the fastest card there is."""
MOST_GFLOPS = 1e9
"""Billions of operations per second."""
MOST_RTT_S = 60.0
MOST_OVERHEAD_S = 1.0
_MOST_TOLD = 8


def check_inventory(inventory: Inventory) -> None:
    """Hold an inventory to what the planner takes for granted, wherever it came from.

    Raises:
        InventoryError: every value that cannot be, with its place and what to do.
    """
    wrong = list(_complaints(inventory))
    if wrong:
        more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
        raise InventoryError(f"the inventory cannot be: {'; '.join(wrong[:_MOST_TOLD])}{more}")


def _complaints(inventory: Inventory) -> Iterator[str]:
    hosts = [node.host for node in inventory.nodes]
    for host in sorted({host for host in hosts if hosts.count(host) > 1}):
        yield f"{hosts.count(host)} nodes are called {host!r}; give each a name of its own"
    for node in inventory.nodes:
        yield from _node(node)
    for link in inventory.links:
        yield from _link(link, hosts)


def _node(node: Node) -> Iterator[str]:
    if not node.host:
        yield "a node has no name; give it one"
    if node.num_cpus < 1:
        yield f"{node.host}: {node.num_cpus} processors; it needs 1 at least"
    if not node.devices:
        yield f"{node.host}: no device; name its processor, or leave the node out"
    for name, amount in (("free disk", node.disk_free_bytes), ("held", node.held_bytes)):
        if not 0 <= amount <= MOST_DISK_BYTES:
            yield f"{node.host}: {amount} bytes {name}; it must be 0 to {MOST_DISK_BYTES}"
    if (count := sum(device.kind == "cpu" for device in node.devices)) > 1:
        yield f"{node.host}: {count} devices are its cpu; join them into one"
    seats = [(device.kind, device.index) for device in node.devices]
    for kind, index in sorted({seat for seat in seats if seats.count(seat) > 1}):
        yield f"{node.host}: {seats.count((kind, index))} devices are {kind}:{index}; number them"
    for device in node.devices:
        yield from _device(device, f"{node.host} {device.kind}:{device.index}")


def _device(device: Device, where: str) -> Iterator[str]:
    if not 0 <= device.memory_bytes <= MOST_BYTES:
        yield (
            f"{where}: {device.memory_bytes} bytes of memory; it must be 0 to {MOST_BYTES}: say "
            "what is free, or leave the device out"
        )
    rates = (
        ("read", "GB/s", MOST_GBPS, device.read_gbps, device.dtype_read_gbps),
        ("compute", "GFLOP/s", MOST_GFLOPS, device.gemm_gflops, device.dtype_gemm_gflops),
        ("read", "GB/s of keys and values", MOST_GBPS, device.kv_read_gbps, ()),
        ("attend", "GFLOP/s", MOST_GFLOPS, device.attention_gflops, ()),
    )
    for verb, unit, most, rate, by_dtype in rates:
        for said, each in (("", rate), *((f" {dtype}", one) for dtype, one in by_dtype)):
            if each is not None and not 0 < each <= most:
                yield (
                    f"{where}: {verb}s{said} at {each:g} {unit}; it must be above 0 and at most "
                    f"{most:g}: measure it (magnetar nodes), or leave it out"
                )
    for what, seconds in (
        ("a layer", device.layer_overhead_s),
        ("a step", device.step_overhead_s),
        ("asking a helper", device.helper_overhead_s),
    ):
        if not 0 <= seconds <= MOST_OVERHEAD_S:
            yield f"{where}: {what} takes {seconds:g} s; it must be 0 to {MOST_OVERHEAD_S:g}"


def _link(link: Link, hosts: list[str]) -> Iterator[str]:
    where = f"link {link.source} to {link.target}"
    for end in {link.source, link.target} - set(hosts):
        yield f"{where}: {end!r} is no node; nodes: {', '.join(hosts[:8])}"
    if not 0 <= link.rtt_s <= MOST_RTT_S:
        yield f"{where}: a round trip of {link.rtt_s:g} s; it must be 0 to {MOST_RTT_S:g}"
    if not 0 <= link.overhead_s <= MOST_OVERHEAD_S:
        yield f"{where}: messages take {link.overhead_s:g} s; it must be 0 to {MOST_OVERHEAD_S:g}"
    if not 0 < link.gbps <= MOST_GBPS:
        yield (
            f"{where}: {link.gbps:g} GB/s; it must be above 0 and at most {MOST_GBPS:g}: where "
            "nothing gets through, leave one of the two nodes out"
        )
