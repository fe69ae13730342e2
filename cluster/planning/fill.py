"""Whether layers fill devices, taken in order of memory: a quick answer, and a Yes is certain."""

from collections.abc import Sequence
from dataclasses import replace

from ...settings import KV_BLOCK_TOKENS
from ..footprint import Footprint
from ..plan import Workload


def fits(weights: Footprint, memories: Sequence[int], workload: Workload) -> bool:
    """Whether the layers fill the devices, one stage each, the largest first; of several pipelines
    those of each, with devices dealt out as where memory alone counts.

    True is certain. With a number of stages that is asked for, stages share devices as evenly as
    their workspaces ask for.
    """
    if (times := workload.num_pipelines or 1) > 1:
        groups: list[list[int]] = [[] for _ in range(times)]
        for memory in sorted(memories, reverse=True):
            min(groups, key=sum).append(memory)
        fewer = replace(workload, num_pipelines=1)
        streams = [-(-(workload.max_concurrency - n) // times) for n in range(times)]
        return all(
            count > 0 and fits(weights, group, replace(fewer, max_concurrency=count))
            for group, count in zip(groups, streams, strict=True)
        )
    tokens = -(-workload.max_context_tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    kv_bytes = workload.max_concurrency * tokens * weights.kv_bytes_per_token
    overhead = weights.workspace_bytes(workload.max_context_tokens)
    needs = [each + kv_bytes for each in weights.layer_bytes]
    needs[0] += weights.embeddings_bytes
    needs[-1] += weights.output_bytes
    asked = workload.num_stages
    counts = [1] * len(memories)
    order = sorted(memories, reverse=True)
    if asked is not None:
        order = order[:asked]
        counts = [1] * len(order)
        for _ in range(asked - len(order)):
            shares = [m / (count + 1) for m, count in zip(order, counts, strict=True)]
            counts[shares.index(max(shares))] += 1
    layer, left = 0, asked
    for memory, count in zip(order, counts, strict=True):
        room, placed = memory - count * overhead, 0
        later = 0 if left is None else left - count
        while layer < len(needs) - later and needs[layer] <= room:
            room -= needs[layer]
            layer, placed = layer + 1, placed + 1
        if left is not None:
            if placed < count:
                return False
            left -= count
    return layer == len(needs)
