"""What would be enough: the least change of each wish or memory that makes a placement possible."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorIndex
from ...settings import KV_BLOCK_TOKENS
from ..footprint import footprint
from ..machines import ComputeDtype, Device, Inventory
from ..plan import Workload
from ..search.place import Place, places_of
from ..units import gigabytes
from .fill import fits

Knob = Literal["dtype", "context", "concurrency", "pipelines", "memory", "memory everywhere"]
DTYPE_LADDER: tuple[ComputeDtype, ...] = tuple(
    dtype for dtype in ("fp32", "bf16", "int8", "int4") if dtype in get_args(ComputeDtype)
)
"""From most to least quality; fp16 stands beside bf16."""
_MEMORY_STEP = 100_000_000
_MOST_MEMORY = 16 * 10**12


PROBED_PLACES = 4
"""Devices up to which the planner itself looks for the border of what is enough."""
_FINENESS = 16
"""Share of a change to which that border is found."""

_ABOUT = 1.15
"""Times the least memory that must be added anywhere, within which more is as good on another
device."""
_DOUBLINGS = 12
"""Of what is enough without pins, until what is enough with them is given up."""

Request = tuple[Inventory, Workload]
CanPlan = Callable[[Inventory, Workload], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change that suffices by itself."""

    knob: Knob
    amount: int
    """Tokens, sequences, or bytes to add; of a dtype its bits."""
    text: str
    host: str | None = None
    """Of ``memory``: whose."""
    device: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """A knob that can be turned by 1 to `most` steps: the further, the more fits."""

    most: int
    request: Callable[[int], Request]
    """What is then asked for."""
    change: Callable[[int], Change]
    is_of_one_device: bool = False
    """Whether it adds memory to one device alone, of which those are told that need least."""


def sufficient_changes(
    config: ModelConfig,
    index: TensorIndex,
    inventory: Inventory,
    workload: Workload,
    dtype: ComputeDtype,
    can_plan: CanPlan | None = None,
) -> tuple[Change, ...]:
    """The least sufficient change of every knob that has one, what costs nothing first.

    Each is found by bisection over a fill of the devices in order of memory, which is never more
    hopeful than the planner where no layers are pinned: what is said to be enough is enough. With
    `can_plan`, which says whether a request has a plan, few devices are asked for less than that,
    and nothing is said of pinned layers that does not hold. `inventory` and `workload` are as
    `node_wishes.without_limits` leaves them.
    """
    footprints = {dtype: footprint(config, index, dtype)}
    has_pins = any(wish.layers for wish in workload.nodes)
    asked = replace(workload, dtype=dtype)

    def is_filled(machines: Inventory, wishes: Workload) -> bool:
        held = wishes.dtype or dtype
        if held not in footprints:
            footprints[held] = footprint(config, index, held)
        memories = [place.usable_bytes for place in places_of(machines)]
        return fits(footprints[held], memories, wishes)

    def steps(turn: _Turn) -> int | None:
        enough = least(lambda n: is_filled(*turn.request(n)), turn.most)
        if can_plan is None or not (has_pins or len(places_of(inventory)) <= PROBED_PLACES):
            return enough
        return _probed(turn, enough, can_plan, may_miss=has_pins)

    changes: list[Change] = []
    fewest: int | None = None
    """Steps of memory on one device, so far."""
    for turn in (*_wishes(inventory, asked, dtype), *_memory(inventory, asked, is_filled)):
        if turn.is_of_one_device and fewest and can_plan and not can_plan(*turn.request(fewest)):
            continue
        if (count := steps(turn)) is not None:
            changes.append(turn.change(count))
            if turn.is_of_one_device:
                fewest = min(count, fewest or count)
    alone = min((each.amount for each in changes if each.knob == "memory"), default=0)
    return tuple(each for each in changes if each.knob != "memory" or each.amount == alone)


def _probed(turn: _Turn, enough: int | None, can_plan: CanPlan, *, may_miss: bool) -> int | None:
    """The least number of steps that the planner can do with, at most `enough` unless that `may`
    not be enough at all."""

    def is_enough(steps: int) -> bool:
        return can_plan(*turn.request(steps))

    high = min(enough or turn.most, turn.most)
    if (enough is None or may_miss) and not (high and is_enough(high)):
        further = [each for n in range(1, _DOUBLINGS) if 0 < (each := high << n) <= turn.most]
        # Where the last of them is in vain, so are all before it.
        if not further or not is_enough(further[-1]):
            return None
        high = next(each for each in further if is_enough(each))
    low = 0
    while high - low > max(1, high // _FINENESS):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high or None


def _wishes(inventory: Inventory, workload: Workload, dtype: ComputeDtype) -> Iterator[_Turn]:
    """What may be asked for less of."""
    lower = DTYPE_LADDER[DTYPE_LADDER.index("bf16" if dtype == "fp16" else dtype) + 1 :]
    bits = {"bf16": 16, "int8": 8, "int4": 4}
    yield _Turn(
        most=len(lower),
        request=lambda n: (inventory, replace(workload, dtype=lower[n - 1])),
        change=lambda n: Change(
            knob="dtype", amount=bits[lower[n - 1]], text=f"--dtype {lower[n - 1]}"
        ),
    )
    blocks = (workload.max_context_tokens - 1) // KV_BLOCK_TOKENS

    def tokens(n: int) -> int:
        return (blocks + 1 - n) * KV_BLOCK_TOKENS

    yield _Turn(
        most=blocks,
        request=lambda n: (inventory, replace(workload, max_context_tokens=tokens(n))),
        change=lambda n: Change(
            knob="context", amount=tokens(n), text=f"--max-context {tokens(n)}"
        ),
    )
    yield from _fewer(inventory, workload)


def _fewer(inventory: Inventory, workload: Workload) -> Iterator[_Turn]:
    sequences, pipelines = workload.max_concurrency, workload.num_pipelines or 1
    yield _Turn(
        most=sequences - 1,
        request=lambda n: (inventory, replace(workload, max_concurrency=sequences - n)),
        change=lambda n: Change(
            knob="concurrency",
            amount=sequences - n,
            text=f"--max-concurrency {sequences - n}",
        ),
    )
    yield _Turn(
        most=pipelines - 1,
        request=lambda n: (inventory, replace(workload, num_pipelines=pipelines - n)),
        change=lambda n: Change(
            knob="pipelines", amount=pipelines - n, text=f"--pipelines {pipelines - n}"
        ),
    )


def _memory(inventory: Inventory, workload: Workload, is_filled: CanPlan) -> Iterator[_Turn]:
    """More memory on the one device where least must be added, or on all alike.

    Where layers are pinned a fill cannot tell which device that is, and several are named.
    """
    places = places_of(inventory)
    pinned = {wish.host for wish in workload.nodes if wish.layers}
    if pinned:
        few = len(places) <= PROBED_PLACES
        for place in places:
            if few or place.node.host in pinned:
                yield _more(inventory, workload, place)
    else:
        yield from _easiest(inventory, workload, is_filled)
    if len(places) > 1:
        yield _more(inventory, workload, None)


def _easiest(inventory: Inventory, workload: Workload, is_filled: CanPlan) -> Iterator[_Turn]:
    """The largest device of those where about the least must be added."""
    kinds = {place.usable_bytes: place for place in reversed(places_of(inventory))}
    turns = [_more(inventory, workload, place) for _, place in sorted(kinds.items(), reverse=True)]
    needed = [least(lambda n, at=turn: is_filled(*at.request(n)), turn.most) for turn in turns]  # type: ignore[misc]
    if few := [steps for steps in needed if steps is not None]:
        border = min(few) * _ABOUT
        yield next(
            turn
            for turn, steps in zip(turns, needed, strict=True)
            if steps is not None and steps <= border
        )


def _more(inventory: Inventory, workload: Workload, place: Place | None) -> _Turn:
    def change(steps: int) -> Change:
        amount = steps * _MEMORY_STEP
        if place is None:
            text = f"{gigabytes(amount)} more on every device"
            return Change(knob="memory everywhere", amount=amount, text=text)
        return Change(
            knob="memory",
            amount=amount,
            text=f"{gigabytes(amount)} more on {place.node.host} ({place.device_name})",
            host=place.node.host,
            device=place.device_name,
        )

    return _Turn(
        most=_MOST_MEMORY // _MEMORY_STEP,
        request=lambda steps: (grown(inventory, place, steps * _MEMORY_STEP), workload),
        change=change,
        is_of_one_device=place is not None,
    )


def grown(inventory: Inventory, place: Place | None, more_bytes: int) -> Inventory:
    """The inventory with more memory on one device; None: on all."""

    def device(host: str, old: Device) -> Device:
        if place is not None and (host, old) != (place.node.host, place.device):
            return old
        return replace(old, memory_bytes=old.memory_bytes + more_bytes)

    nodes = (
        replace(node, devices=tuple(device(node.host, each) for each in node.devices))
        for node in inventory.nodes
    )
    return replace(inventory, nodes=tuple(nodes))


def least(holds: Callable[[int], bool], highest: int) -> int | None:
    """The least number from 1 to `highest` for which `holds`, which stays true from there on."""
    if highest < 1 or not holds(highest):
        return None
    low, high = 1, highest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
