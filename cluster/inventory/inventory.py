"""What this machine has for a model: processors, memory, accelerators, disk."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from ..machines import Device, Node
from .measure import with_known_speeds


def host_label() -> str:
    """A stable name of this machine that may stand in a Ray label (at most 63 characters)."""
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node()).strip("-._")[:63].strip("-._")
    return label or "localhost"


def probe_node(
    host: str,
    address: str,
    store: Path,
    *,
    memory_limit_bytes: int | None = None,
    cpu_limit: int | None = None,
) -> Node:
    """Look at this machine; `store` is where releases go, it need not exist yet.

    Speeds are those that `measure_speeds` found here before, if it ever ran.

    Free memory is what is available now, bounded by the control group. The limits are what the
    owner of a Ray node gave to it.
    """
    available = psutil.virtual_memory().available
    folders = cgroup_folders(Path("/sys/fs/cgroup"), _read(Path("/proc/self/cgroup")))
    limits = [available, memory_limit_bytes, cgroup_free_bytes(folders)]
    free = min(limit for limit in limits if limit is not None)
    cpu = Device(kind="cpu", memory_bytes=free, name=platform.processor() or platform.machine())
    node = Node(
        host=host,
        address=address,
        num_cpus=min(num_cpus(folders), cpu_limit or sys.maxsize),
        devices=(cpu, *_cuda_devices()),
        disk_free_bytes=shutil.disk_usage(_existing(store)).free,
    )
    return with_known_speeds(node)


def cgroup_folders(root: Path, membership: str) -> tuple[Path, ...]:
    """The control group of this process and its ancestors up to `root`, innermost first.

    `membership` is the text of ``/proc/self/cgroup``. In a container the group usually is the
    root itself; a v1 memory controller counts as one more folder.
    """
    own = next((line[3:] for line in membership.splitlines() if line.startswith("0::")), "/")
    group = root / own.strip("/")
    inside = [group, *group.parents]
    folders = inside[: inside.index(root) + 1] if root in inside else [root]
    return (*folders, root / "memory")


def num_cpus(folders: Iterable[Path]) -> int:
    """Processors this process may use: its affinity, bounded by the quotas of its groups (v2)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpus = cpus or 1
    for folder in folders:
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cpus = min(cpus, round(int(quota) / int(period)))
    return max(1, cpus)


def cgroup_free_bytes(folders: Iterable[Path]) -> int | None:
    """Memory that the tightest control group leaves; None without a limit.

    Page cache counts as free: the kernel gives it back before the limit bites.
    """
    free: int | None = None
    for folder in folders:
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if not limit.isdigit() or not used.isdigit() or int(limit) >= 1 << 60:
            continue
        stat = _read(folder / "memory.stat")
        rows = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
        cache = int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
        left = max(0, int(limit) - int(used) + cache)
        free = left if free is None else min(free, left)
    return free


def _cuda_devices() -> tuple[Device, ...]:
    if not Path("/dev/nvidiactl").exists():  # spares machines without a card the import of torch
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(
        Device(
            kind="cuda",
            index=index,
            memory_bytes=torch.cuda.mem_get_info(index)[0],
            name=torch.cuda.get_device_name(index),
        )
        for index in range(torch.cuda.device_count())
    )


def _existing(path: Path) -> Path:
    """The nearest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
