"""What would be enough: the least change of each wish or memory that makes a placement possible."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ...settings import KV_BLOCK_TOKENS
from ..footprint import Footprint, footprint
from ..plan import ComputeDtype, Inventory, Workload
from ..search.place import MARGIN, places_of
from ..units import gigabytes

Knob = Literal["dtype", "context", "concurrency", "pipelines", "memory", "memory everywhere"]
DTYPE_LADDER: tuple[ComputeDtype, ...] = tuple(
    dtype for dtype in ("fp32", "bf16", "int8", "int4") if dtype in get_args(ComputeDtype)
)
"""From most to least quality; fp16 stands beside bf16."""
_MEMORY_STEP = 100_000_000
_MOST_MEMORY = 16 * 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change that suffices by itself."""

    knob: Knob
    amount: int
    """Tokens, sequences, or bytes to add; of a dtype its bits."""
    text: str


def sufficient_changes(
    config: ModelConfig,
    index: TensorIndex,
    inventory: Inventory,
    workload: Workload,
    dtype: ComputeDtype,
) -> tuple[Change, ...]:
    """The least sufficient change of every knob that has one, what costs nothing first.

    Each is found by bisection over a fill of the devices in order of memory, which is never
    more hopeful than the planner: what is said to be enough is enough.
    """
    weights = footprint(config, index, dtype)
    memories = [place.usable_bytes for place in places_of(inventory)]

    def fits_with(wishes: Workload, held: Footprint = weights) -> bool:
        return fits(held, memories, wishes)

    found: list[Change] = []
    for lower in DTYPE_LADDER[DTYPE_LADDER.index("bf16" if dtype == "fp16" else dtype) + 1 :]:
        if fits_with(workload, footprint(config, index, lower)):
            bits = {"bf16": 16, "int8": 8, "int4": 4}[lower]
            found.append(Change(knob="dtype", amount=bits, text=f"--dtype {lower}"))
            break
    blocks = most(
        lambda n: fits_with(replace(workload, max_context_tokens=n * KV_BLOCK_TOKENS)),
        (workload.max_context_tokens - 1) // KV_BLOCK_TOKENS,
    )
    if blocks:
        tokens = blocks * KV_BLOCK_TOKENS
        found.append(Change(knob="context", amount=tokens, text=f"a context of {tokens} tokens"))
    sequences = most(
        lambda n: fits_with(replace(workload, max_concurrency=n)), workload.max_concurrency - 1
    )
    if sequences:
        text = f"{sequences} sequence{'s' * (sequences > 1)} at once"
        found.append(Change(knob="concurrency", amount=sequences, text=text))
    if pipelines := most(
        lambda n: fits_with(replace(workload, num_pipelines=n)), (workload.num_pipelines or 1) - 1
    ):
        text = f"--pipelines {pipelines}"
        found.append(Change(knob="pipelines", amount=pipelines, text=text))
    found += _memory(inventory, lambda grown: fits(weights, grown, workload))
    return tuple(found)


def _memory(inventory: Inventory, is_enough: Callable[[Sequence[int]], bool]) -> list[Change]:
    """More memory on the one device where least must be added, or on all alike."""
    places = places_of(inventory)
    memories = [place.usable_bytes for place in places]
    found: list[Change] = []

    def grown(number: int | None, steps: int) -> list[int]:
        more = int(steps * _MEMORY_STEP * (1 - MARGIN))
        return [m + more * (number in (None, at)) for at, m in enumerate(memories)]

    kinds: dict[int, int] = {}
    for number, memory in enumerate(memories):
        kinds.setdefault(memory, number)
    best: tuple[int, int] | None = None
    for number in kinds.values():
        steps = least(lambda n, at=number: is_enough(grown(at, n)), _MOST_MEMORY // _MEMORY_STEP)  # type: ignore[misc]
        if steps is not None and (best is None or steps < best[0]):
            best = (steps, number)
    if best is not None:
        amount, place = best[0] * _MEMORY_STEP, places[best[1]]
        where = f"{place.node.host} ({place.device_name})"
        found.append(
            Change(knob="memory", amount=amount, text=f"{gigabytes(amount)} more on {where}")
        )
    if len(places) > 1:
        steps = least(lambda n: is_enough(grown(None, n)), _MOST_MEMORY // _MEMORY_STEP)
        if steps is not None:
            amount = steps * _MEMORY_STEP
            text = f"{gigabytes(amount)} more on every device"
            found.append(Change(knob="memory everywhere", amount=amount, text=text))
    return found


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


def least(holds: Callable[[int], bool], highest: int) -> int | None:
    """The least number from 1 to `highest` for which `holds`, which stays true from there on."""
    if highest < 1 or not holds(highest):
        return None
    low, high = 1, highest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def most(holds: Callable[[int], bool], highest: int) -> int | None:
    """The greatest number from 1 to `highest` for which `holds`, which is true up to there."""
    failing = least(lambda n: not holds(n), highest)
    if failing is None:
        return highest if highest >= 1 else None
    return failing - 1 or None
