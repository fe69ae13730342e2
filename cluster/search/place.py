"""A device that may get stages, and what two of them have between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..machines import Device, Inventory, Node

MARGIN = 0.10
"""Share of every device that stays free; Ray's memory monitor kills at 95 % used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One device of one node."""

    node: Node
    device: Device

    @property
    def usable_bytes(self) -> int:
        """What may be planned with."""
        return int(self.device.memory_bytes * (1 - MARGIN))

    @property
    def device_name(self) -> str:
        """As in `StagePlan.device`."""
        return "cpu" if self.device.kind == "cpu" else f"cuda:{self.device.index}"


Seating = tuple[tuple[Place, int], ...]
"""Places in pipeline order, each with its number of stages."""


def places_of(inventory: Inventory) -> tuple[Place, ...]:
    """Every device; those of nodes that hold bytes of the release first, which decides ties."""
    nodes: Sequence[Node] = sorted(inventory.nodes, key=lambda n: (-n.held_bytes, n.host))
    return tuple(Place(node=node, device=device) for node in nodes for device in node.devices)
