"""What a user wants of single nodes: left out, less memory, these layers. Pure."""

from dataclasses import replace
from itertools import pairwise

from ...errors import InfeasiblePlanError, UsageError
from ...fetcher.config import ModelConfig
from ..machines import Inventory, Node
from ..plan import NodeWish, Workload


def allowed_nodes(config: ModelConfig, inventory: Inventory, workload: Workload) -> Inventory:
    """The inventory as the wishes of the workload leave it; pins are only checked.

    Raises:
        UsageError: a wish for a node that is not there, two for one node, pins to the same layer,
            of a node that is excluded, or of layers that the model does not have.
        InfeasiblePlanError: no node is left.
    """
    wishes = {wish.host: wish for wish in workload.nodes}
    _check(config, inventory, workload)
    nodes = tuple(
        _limited(node, wishes.get(node.host))
        for node in inventory.nodes
        if not (node.host in wishes and wishes[node.host].exclude)
    )
    if not nodes:
        there = ", ".join(node.host for node in inventory.nodes)
        raise InfeasiblePlanError(f"every node is excluded ({there}); leave one of them in")
    return replace(inventory, nodes=nodes)


def without_limits(
    config: ModelConfig, inventory: Inventory, workload: Workload
) -> tuple[Inventory, Workload]:
    """The same request with nothing of nodes left but pins: nodes and memory that may not be used
    are taken out of the inventory. Raises as `allowed_nodes`."""
    pins = tuple(
        NodeWish(host=wish.host, layers=wish.layers) for wish in workload.nodes if wish.layers
    )
    return allowed_nodes(config, inventory, workload), replace(workload, nodes=pins)


def _limited(node: Node, wish: NodeWish | None) -> Node:
    if wish is None or wish.memory_bytes is None:
        return node
    devices = tuple(
        replace(device, memory_bytes=min(device.memory_bytes, wish.memory_bytes))
        for device in node.devices
    )
    return replace(node, devices=devices)


def _check(config: ModelConfig, inventory: Inventory, workload: Workload) -> None:
    there = [node.host for node in inventory.nodes]
    asked = [wish.host for wish in workload.nodes]
    for wish in workload.nodes:
        if wish.host not in there:
            raise UsageError(
                f"a wish for {wish.host}, which is no node; nodes: {', '.join(there[:8])}"
            )
        if asked.count(wish.host) > 1:
            raise UsageError(f"two wishes for {wish.host}; join them into one")
        if wish.memory_bytes is not None and wish.memory_bytes < 1:
            raise UsageError(
                f"{wish.host} may use {wish.memory_bytes} bytes; exclude it, or allow some"
            )
        if wish.layers is not None:
            _check_pin(config, wish, wish.layers)
    pinned = sorted((wish.layers, wish.host) for wish in workload.nodes if wish.layers)
    for (one, host), (other, neighbour) in pairwise(pinned):
        if other[0] < one[1]:
            raise UsageError(
                f"layers {one[0]}-{one[1] - 1} are pinned to {host} and {other[0]}-{other[1] - 1} "
                f"to {neighbour}; a layer has one node"
            )


def _check_pin(config: ModelConfig, wish: NodeWish, layers: tuple[int, int]) -> None:
    first, end = layers
    if wish.exclude:
        raise UsageError(
            f"{wish.host} is excluded and layers {first}-{end - 1} are pinned to it; choose one"
        )
    if not 0 <= first < end <= config.n_layers:
        raise UsageError(
            f"layers {first}-{end - 1} are pinned to {wish.host}; the model has layers 0 to "
            f"{config.n_layers - 1}"
        )
