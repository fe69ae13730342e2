"""Which tensors of a release a node's stages and helpers read, and in which order."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from ...fetcher.tensors import TensorEntry, TensorIndex
from ..plan import ExpertHost, ExpertIds, Plan, StagePlan


def stage_shard(index: TensorIndex, stage: StagePlan) -> tuple[TensorEntry, ...]:
    """The tensors that a stage loads, without those of its helpers; in model order. Pure."""

    def is_needed(entry: TensorEntry) -> bool:
        layer, expert = _place(entry)
        if layer is None:
            # The final norm goes with the output head, as the loader reads them.
            is_embedding = entry.name.startswith("tok_embeddings.")
            return stage.has_embeddings if is_embedding else stage.has_output
        if not stage.first_layer <= layer < stage.end_layer:
            return False
        if expert is None or stage.experts is None:
            return True
        return expert in stage.experts[layer - stage.first_layer]

    return tuple(entry for entry in index if is_needed(entry))


def helper_shard(
    index: TensorIndex, helper: ExpertHost, first_layer: int
) -> tuple[TensorEntry, ...]:
    """The experts that a helper of a stage from `first_layer` on loads; in model order. Pure."""
    experts: ExpertIds = helper.experts

    def is_needed(entry: TensorEntry) -> bool:
        layer, expert = _place(entry)
        if layer is None or expert is None:
            return False
        return 0 <= layer - first_layer < len(experts) and expert in experts[layer - first_layer]

    return tuple(entry for entry in index if is_needed(entry))


def shard_of(index: TensorIndex, plan: Plan, host: str) -> tuple[TensorEntry, ...]:
    """The tensors that the node loads, in model order; pure."""
    needed = {entry.name for shard in _shards(index, plan, host) for entry in shard}
    return tuple(entry for entry in index if entry.name in needed)


def loading_steps(index: TensorIndex, plan: Plan, host: str) -> tuple[tuple[TensorEntry, ...], ...]:
    """What the node loads, in steps: of each stage and helper one of its `steps_of`.

    All are at their first layer in about the same step, so that none waits for the others.
    """
    by_member = [steps_of(shard) for shard in _shards(index, plan, host)]
    return tuple(
        tuple({entry.name: entry for step in together for entry in step}.values())
        for together in zip_longest(*by_member, fillvalue=())
    )


def steps_of(shard: Sequence[TensorEntry]) -> list[tuple[TensorEntry, ...]]:
    """The embeddings, each layer, then the rest: as the loader reads them."""
    steps: dict[tuple[int, int], list[TensorEntry]] = {}
    for entry in shard:
        layer, _ = _place(entry)
        if layer is not None:
            key = (1, layer)
        else:
            key = (0, 0) if entry.name.startswith("tok_embeddings.") else (2, 0)
        steps.setdefault(key, []).append(entry)
    return [tuple(steps[key]) for key in sorted(steps)]


def _shards(index: TensorIndex, plan: Plan, host: str) -> Iterable[tuple[TensorEntry, ...]]:
    for stage in plan.stages:
        if stage.host == host:
            yield stage_shard(index, stage)
        for helper in stage.helpers:
            if helper.host == host:
                yield helper_shard(index, helper, stage.first_layer)


def _place(entry: TensorEntry) -> tuple[int | None, int | None]:
    """Layer and expert of a tensor; None where it belongs to none."""
    head, *path = entry.name.split(".")
    if head != "layers":
        return None, None
    is_expert = path[1:3] == ["feed_forward", "experts"]
    return int(path[0]), int(path[3]) if is_expert else None
