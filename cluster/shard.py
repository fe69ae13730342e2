"""Which tensors of a release a node's stages read."""

from collections.abc import Iterable

from ..fetcher.tensors import TensorEntry, TensorIndex
from .plan import StagePlan


def shard_of(index: TensorIndex, stages: Iterable[StagePlan]) -> tuple[TensorEntry, ...]:
    """The tensors that these stages load, in model order; pure."""
    stages = tuple(stages)
    layers = {layer for stage in stages for layer in range(stage.first_layer, stage.end_layer)}
    has_embeddings = any(stage.has_embeddings for stage in stages)
    has_output = any(stage.has_output for stage in stages)

    def is_needed(name: str) -> bool:
        head, _, rest = name.partition(".")
        if head == "layers":
            return int(rest.partition(".")[0]) in layers
        # The final norm goes with the output head, as the loader reads them.
        return has_embeddings if head == "tok_embeddings" else has_output

    return tuple(entry for entry in index if is_needed(entry.name))
