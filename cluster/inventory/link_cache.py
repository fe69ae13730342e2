"""Links that `magnetar nodes` measured, kept on this machine for the plans of later deployments."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...settings import data_dir
from ..machines import Inventory, Link, Node


def remember_links(inventory: Inventory) -> None:
    """Keep the links of `inventory`, over those that were kept before."""
    names = {node.host: _name(node) for node in inventory.nodes}
    rows = {
        f"{names[link.source]} {names[link.target]}": [link.rtt_s, link.gbps, link.overhead_s]
        for link in inventory.links
    }
    file = _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_read() | rows, indent=1), encoding="utf-8")
    temporary.replace(file)


def remembered_links(nodes: Sequence[Node]) -> tuple[Link, ...]:
    """What is kept of the links between `nodes`, which are known by name and address."""
    rows = _read()
    return tuple(
        Link(source=a.host, target=b.host, rtt_s=row[0], gbps=row[1], overhead_s=row[2])
        for a in nodes
        for b in nodes
        if (row := rows.get(f"{_name(a)} {_name(b)}")) is not None and len(row) == 3
    )


def _name(node: Node) -> str:
    return f"{node.host}@{node.address}"


def _file() -> Path:
    return data_dir() / "links.json"


def _read() -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}
