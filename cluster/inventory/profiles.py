"""Named devices to plan with before they exist: what they are worth, and who says so."""

import functools
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..plan import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A device by name."""

    device: Device
    source: str
    """Where the figures come from, those that all devices of a kind share last."""


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
    return Profile(
        device=Device(
            kind=row["kind"],
            memory_bytes=int(row["memoryGigabytes"] * 1e9),
            name=name,
            read_gbps=float(row["readGigabytesPerSecond"]),
            gemm_gflops=float(row["gemmGflops"]) if "gemmGflops" in row else None,
            layer_overhead_s=around["layerMicroseconds"] / 1e6,
            step_overhead_s=around["stepMicroseconds"] / 1e6,
            helper_overhead_s=around["helperMicroseconds"] / 1e6,
        ),
        source=f"{row['source']}; {around['source']}",
    )
