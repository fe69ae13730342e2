"""How much the caches of this machine's processors hold."""

from pathlib import Path
from typing import Final

_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Of all groups of cores that share one, together; 0 where the system does not tell."""
    found: dict[str, int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index3"):
        try:
            size = (folder / "size").read_text().strip()
            found[(folder / "shared_cpu_list").read_text()] = int(size[:-1]) * _UNITS[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return sum(found.values())
