"""Nodes, how fast they are and what lies between them, as a table."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from ..cluster.machines import ComputeDtype

if TYPE_CHECKING:
    from ..cluster.machines import Device, Inventory, Node

_HEAD = (
    *("node", "device", "name", "cpus", "memory"),
    *("reads", "reads kv", "computes", "attends", "disk free"),
)
_SPARED = ("name", "disk free", "cpus", "attends", "reads kv")
"""Columns that a narrow terminal does without, in this order; yaml and json have all."""


def nodes_table(inventory: "Inventory", *, width: int | None = None) -> str:
    """Nodes, their speed by dtype and links as aligned columns.

    Lines are at most `width` long where columns can be spared; None: as long as they are.
    """
    from ..cluster.units import milliseconds, wrapped

    rows = [_HEAD, *(row for node in inventory.nodes for row in _node_rows(node))]
    lines = columns(rows, width)
    for node in inventory.nodes:
        if node.was_busy:
            lines += wrapped(
                f"{node.host} was busy: other work took {node.busy_share * 100:.0f} % of its "
                "processors while its speeds were measured, and they may be too low; --again "
                "measures anew",
                width,
            )
    if speeds := _speeds(inventory):
        lines += ["", *columns(speeds)]
    if inventory.links:
        wires = [("from", "to", "round trip", "bandwidth")]
        wires += [
            (
                link.source,
                "itself" if link.target == link.source else link.target,
                milliseconds(link.rtt_s),
                f"{link.gbps:.3g} GB/s",
            )
            for link in inventory.links
        ]
        lines += ["", *columns(wires)]
    return "\n".join(lines)


def _node_rows(node: "Node") -> "Iterator[tuple[str, ...]]":
    from ..cluster.units import gigabytes

    for device in node.devices:
        yield (
            node.host,
            _name(device),
            device.name or "-",
            str(node.num_cpus),
            gigabytes(device.memory_bytes),
            _told(device.read_gbps, ".1f", "GB/s"),
            _told(device.kv_read_gbps, ".1f", "GB/s"),
            _told(device.gemm_gflops, ".0f", "GFLOP/s"),
            _told(device.attention_gflops, ".0f", "GFLOP/s"),
            gigabytes(node.disk_free_bytes),
        )


def _told(rate: float | None, digits: str, unit: str) -> str:
    return f"{rate:{digits}} {unit}" if rate else "?"


def _speeds(inventory: "Inventory") -> list[tuple[str, ...]]:
    """What was measured by dtype; nothing where no device has more than one speed."""
    seats = [(node.host, device) for node in inventory.nodes for device in node.devices]
    known = {
        dtype
        for _, device in seats
        for dtype, _ in (*device.dtype_read_gbps, *device.dtype_gemm_gflops)
    }
    if not known:
        return []
    dtypes = [dtype for dtype in get_args(ComputeDtype) if dtype == "bf16" or dtype in known]
    rows = [("node", "device", "", *dtypes)]
    for host, device in seats:
        reads = {"bf16": device.read_gbps, **dict(device.dtype_read_gbps)}
        computes = {"bf16": device.gemm_gflops, **dict(device.dtype_gemm_gflops)}
        told = [f"{rate:.1f}" if (rate := reads.get(each)) else "?" for each in dtypes]
        rows.append((host, _name(device), "GB/s", *told))
        told = [f"{rate:.0f}" if (rate := computes.get(each)) else "?" for each in dtypes]
        rows.append(("", "", "GFLOP/s", *told))
    return rows


def _name(device: "Device") -> str:
    return "cpu" if device.kind == "cpu" else f"cuda:{device.index}"


def columns(rows: Sequence[tuple[str, ...]], width: int | None = None) -> list[str]:
    """Rows with their cells below each other; a narrow terminal does without some."""
    kept = list(range(len(rows[0])))
    while True:
        widths = [max(len(row[column]) for row in rows) for column in kept]
        lines = [
            "  ".join(row[column].ljust(size) for column, size in zip(kept, widths, strict=True))
            for row in rows
        ]
        spare = [number for name in _SPARED for number in kept if rows[0][number] == name]
        if width is None or max(map(len, lines)) <= width or not spare:
            return [line.rstrip() for line in lines]
        kept.remove(spare[0])
