"""How busy an engine is, in numbers; those of several engines together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot between two steps."""

    running: int = 0
    """Requests that hold KV blocks."""
    waiting: int = 0
    steps_in_flight: int = 0
    num_kv_blocks: int
    kv_blocks_free: int
    num_preemptions: int = 0
    """Since the start, like the following."""
    num_cache_queries: int = 0
    """Tokens of prompts that were looked for in the KV cache."""
    num_cache_hits: int = 0
    """Those that were there."""
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By layer, the tokens that each expert was chosen for; some seconds old."""
    is_over: bool = False
    """It serves nobody any more."""
    num_moved: int = 0
    """Requests that went on in another pipeline, or later, when theirs was lost."""
    num_restarts: int = 0
    """How often the pipeline was lost and came back."""
    pipelines: tuple["EngineStats", ...] = ()
    """Of each pipeline, where a router is before them."""


def since(past: EngineStats, now: EngineStats) -> EngineStats:
    """`now`, of the engine that took the place of one with `past`: what counts, counts on."""
    return replace(
        now,
        num_preemptions=past.num_preemptions + now.num_preemptions,
        num_cache_queries=past.num_cache_queries + now.num_cache_queries,
        num_cache_hits=past.num_cache_hits + now.num_cache_hits,
        num_restarts=past.num_restarts + 1,
        expert_tokens=_sums([past.expert_tokens, now.expert_tokens]),
    )


def total(
    pipelines: Sequence[EngineStats], *, num_moved: int = 0, num_between: int = 0
) -> EngineStats:
    """Of all pipelines together; the KV blocks are those of the pipelines that serve.

    `num_between` requests wait in none of them.
    """
    serving = [each for each in pipelines if not each.is_over] or pipelines
    return EngineStats(
        running=sum(each.running for each in pipelines),
        waiting=sum(each.waiting for each in pipelines) + num_between,
        steps_in_flight=sum(each.steps_in_flight for each in pipelines),
        num_kv_blocks=sum(each.num_kv_blocks for each in serving),
        kv_blocks_free=sum(each.kv_blocks_free for each in serving),
        num_preemptions=sum(each.num_preemptions for each in pipelines),
        num_cache_queries=sum(each.num_cache_queries for each in pipelines),
        num_cache_hits=sum(each.num_cache_hits for each in pipelines),
        expert_tokens=_sums(each.expert_tokens for each in pipelines),
        is_over=all(each.is_over for each in pipelines),
        num_moved=num_moved,
        num_restarts=sum(each.num_restarts for each in pipelines),
        pipelines=tuple(pipelines),
    )


def _sums(counts: Iterable[Mapping[int, tuple[int, ...]]]) -> dict[int, tuple[int, ...]]:
    """Layer by layer, expert by expert; a pipeline that has not told yet is left out."""
    summed: dict[int, tuple[int, ...]] = {}
    for by_layer in counts:
        for layer, tokens in by_layer.items():
            before = summed.get(layer, (0,) * len(tokens))
            summed[layer] = tuple(a + b for a, b in zip(before, tokens, strict=True))
    return summed
