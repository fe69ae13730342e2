"""Named devices to plan with before they exist: what they are worth, and who says so."""

import functools
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..machines import Device
from ..units import milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A device by name."""

    device: Device
    source: str
    """Where its own figures come from."""
    overheads_source: str
    """Where those come from that all devices of a kind share."""
    is_measured: bool
    """Whether its reading rate was measured on such a device, by whoever; else the data sheet is
    derated."""


@functools.cache
def profiles() -> Mapping[str, Profile]:
    """All that are known, by name."""
    import yaml

    text = (importlib.resources.files(__package__) / "profiles.yaml").read_text(encoding="utf-8")
    known = yaml.safe_load(text)
    return {
        name: _profile(name, row, known["overheads"][row["kind"]])
        for name, row in known["devices"].items()
    }


def _profile(name: str, row: Mapping[str, Any], around: Mapping[str, Any]) -> Profile:
    is_measured = row["source"].startswith("measured")
    layer_s, step_s = around["layerMicroseconds"] / 1e6, around["stepMicroseconds"] / 1e6
    assumed = (
        f"{name} is as fast as {'others measured' if is_measured else 'its data sheet, derated'}; "
        f"{milliseconds(layer_s)} for a layer and {milliseconds(step_s)} for a step beside their "
        f"bytes: {around['assumed']}; keys and values at {around['kvReadShare']:g} of the speed of "
        f"weights, attention in prompts at {around['attentionShare']:g} of that of products"
    )
    return Profile(
        device=Device(
            kind=row["kind"],
            memory_bytes=int(row["memoryGigabytes"] * 1e9),
            name=name,
            assumed=assumed,
            read_gbps=float(row["readGigabytesPerSecond"]),
            gemm_gflops=float(row["gemmGflops"]),
            kv_read_gbps=row["readGigabytesPerSecond"] * around["kvReadShare"],
            attention_gflops=row["gemmGflops"] * around["attentionShare"],
            layer_overhead_s=layer_s,
            step_overhead_s=step_s,
            helper_overhead_s=around["helperMicroseconds"] / 1e6,
        ),
        source=row["source"],
        overheads_source=around["source"],
        is_measured=is_measured,
    )
