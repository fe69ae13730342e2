"""Which tensors of a release a node's stages and helpers read."""

from ..fetcher.tensors import TensorEntry, TensorIndex
from .plan import Plan


def shard_of(index: TensorIndex, plan: Plan, host: str) -> tuple[TensorEntry, ...]:
    """The tensors that the node loads, in model order; pure."""
    stages = [stage for stage in plan.stages if stage.host == host]
    layers = {layer for stage in stages for layer in range(stage.first_layer, stage.end_layer)}
    has_embeddings = any(stage.has_embeddings for stage in stages)
    has_output = any(stage.has_output for stage in stages)
    spread = _experts_by_layer(plan, host)

    def is_needed(name: str) -> bool:
        head, *path = name.split(".")
        if head != "layers":
            # The final norm goes with the output head, as the loader reads them.
            return has_embeddings if head == "tok_embeddings" else has_output
        layer = int(path[0])
        if layer in spread and path[1:3] == ["feed_forward", "experts"]:
            return int(path[3]) in spread[layer]
        return layer in layers

    return tuple(entry for entry in index if is_needed(entry.name))


def _experts_by_layer(plan: Plan, host: str) -> dict[int, set[int]]:
    """What the node holds of the layers whose experts it need not hold all."""
    found: dict[int, set[int]] = {}
    for stage in plan.stages:
        shares = [helper.experts for helper in stage.helpers if helper.host == host]
        if stage.host == host and stage.experts is not None:
            shares.append(stage.experts)
        elif stage.host == host:
            continue  # all of them, whatever another device of the node holds too
        for experts in shares:
            for layer, ids in enumerate(experts, start=stage.first_layer):
                found.setdefault(layer, set()).update(ids)
    return found
