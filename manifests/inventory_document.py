"""An inventory as the value of an inventory file."""

from typing import Any

from ..cluster.machines import ComputeDtype, Device, Inventory


def inventory_document(inventory: Inventory) -> dict[str, Any]:
    """An inventory as the value of such a file; `inventory.py` reads it."""
    return {
        "apiVersion": "magnetar/v1",
        "kind": "Inventory",
        "nodes": [
            {
                "host": node.host,
                "cpus": node.num_cpus,
                "diskFreeBytes": node.disk_free_bytes,
                **({"heldBytes": node.held_bytes} if node.held_bytes else {}),
                **({"busyShare": round(node.busy_share, 2)} if node.busy_share else {}),
                "devices": [_device_value(device) for device in node.devices],
            }
            for node in inventory.nodes
        ],
        **(
            {
                "links": [
                    {
                        "source": link.source,
                        "target": link.target,
                        "rttMilliseconds": round(link.rtt_s * 1000, 4),
                        "gigabytesPerSecond": float(f"{link.gbps:.4g}"),
                        "overheadMicroseconds": round(link.overhead_s * 1e6, 1),
                    }
                    for link in inventory.links
                ]
            }
            if inventory.links
            else {}
        ),
    }


def _device_value(device: Device) -> dict[str, Any]:
    def rounded(rates: tuple[tuple[ComputeDtype, float], ...]) -> dict[str, float]:
        return {dtype: float(f"{rate:.4g}") for dtype, rate in rates}

    value: dict[str, Any] = {"kind": device.kind}
    if device.name:
        value["name"] = device.name
    value["memoryBytes"] = device.memory_bytes
    if device.read_gbps is not None:
        value["readGigabytesPerSecond"] = float(f"{device.read_gbps:.4g}")
    if device.dtype_read_gbps:
        value["readByDtype"] = rounded(device.dtype_read_gbps)
    if device.gemm_gflops is not None:
        value["gemmGflops"] = float(f"{device.gemm_gflops:.4g}")
    if device.dtype_gemm_gflops:
        value["gemmByDtype"] = rounded(device.dtype_gemm_gflops)
    for name, rate in (
        ("kvReadGigabytesPerSecond", device.kv_read_gbps),
        ("attentionGflops", device.attention_gflops),
    ):
        if rate is not None:
            value[name] = float(f"{rate:.4g}")
    for name, seconds in (
        ("layerOverheadMicroseconds", device.layer_overhead_s),
        ("stepOverheadMicroseconds", device.step_overhead_s),
        ("helperOverheadMicroseconds", device.helper_overhead_s),
    ):
        if seconds:
            value[name] = float(f"{seconds * 1e6:.4g}")
    return value
