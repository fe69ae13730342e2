"""Named devices to plan with before they exist: what they are worth, and who says so."""

import functools
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass

from ..plan import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A device by name."""

    device: Device
    source: str
    """Where the figures come from."""


@functools.cache
def profiles() -> Mapping[str, Profile]:
    """All that are known, by name."""
    import yaml

    text = (importlib.resources.files(__package__) / "profiles.yaml").read_text(encoding="utf-8")
    return {
        name: Profile(
            device=Device(
                kind=row["kind"],
                memory_bytes=int(row["memoryGigabytes"] * 1e9),
                name=name,
                read_gbps=float(row["readGigabytesPerSecond"]),
                gemm_gflops=float(row["gemmGflops"]) if "gemmGflops" in row else None,
            ),
            source=row["source"],
        )
        for name, row in yaml.safe_load(text).items()
    }
