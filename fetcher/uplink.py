"""How many pieces each uplink of a cluster brings, so that the last of them ends soonest. Pure.

Pieces count as equally large. Those that the same hosts want are a group. Any uplink may bring any
piece, but what its host does not want is carried: it takes room there and crosses the network
inside once more. So of all divisions that end soonest one with the fewest carried pieces is taken.
It is a flow from the groups to the uplinks, which are as wide as they bring pieces until the end:
first without any that are carried, then with them. No flow that ends then carries fewer, because
each carried piece adds one at most (max-flow min-cut).
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_STEPS: Final = 16
"""The water rises in so many steps: those who want the same have about the same to do."""
_PRECISION: Final = 1e-9
_HALVINGS: Final = 24
_START, _ANY, _END = "start", "any", "end"

_Vertex = str | tuple[str, frozenset[str] | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Uplink:
    """The way out of one host."""

    host: str
    rate: float
    """Pieces in a unit of time; above 0."""
    busy: int = 0
    """Pieces that it brings besides."""
    room: int | None = None
    """Pieces that it may carry; None: any number."""

    def within(self, end: float) -> int:
        """How many more pieces it brings until then."""
        return max(0, int(end * self.rate * (1 + _PRECISION) + _PRECISION) - self.busy)


Portions = Mapping[frozenset[str], Mapping[str, int]]
"""Of each group, how many pieces each host brings."""


def portions(groups: Mapping[frozenset[str], int], uplinks: Sequence[Uplink]) -> Portions:
    """Divides groups of so many pieces, which are known by the hosts that want them.

    Of groups that nobody with an uplink wants every piece is carried; where there is not the room
    for all of those, they may be anywhere. There has to be an uplink.
    """
    hosts = frozenset(uplink.host for uplink in uplinks)
    rooms = [sum(groups.values()) if u.room is None else u.room for u in uplinks]
    fits = sum(rooms) >= sum(count for group, count in groups.items() if not group & hosts)
    takers = {group: group & hosts or (frozenset() if fits else hosts) for group in groups}
    end = _soonest_end(groups, takers, uplinks)
    flow = _Flow(groups, takers, uplinks)
    for carries in (False, True):
        flow.open_room(carries)
        # Just before the end all are as busy as they can be; what is left are last pieces.
        for part in (*(step / _STEPS for step in range(1, _STEPS)), 1 - 1e-7, 1.0):
            flow.raise_to(end * part)
    assert flow.num_placed == sum(groups.values())
    return flow.portions()


def _soonest_end(
    groups: Mapping[frozenset[str], int],
    takers: Mapping[frozenset[str], frozenset[str]],
    uplinks: Sequence[Uplink],
) -> float:
    """When the last uplink ends at the least. Exact where room does not matter."""
    count = sum(groups.values())

    def suffices(end: float) -> bool:
        flow = _Flow(groups, takers, uplinks)
        flow.open_room(True)
        flow.raise_to(end)
        return flow.num_placed == count

    # As if there were room everywhere: each piece to whoever is done with it first.
    queue = [((uplink.busy + 1) / uplink.rate, uplink) for uplink in uplinks]
    ends = [(end, number) for number, (end, _) in enumerate(queue)]
    heapq.heapify(ends)
    low = 0.0
    for _ in range(count):
        low, number = ends[0]
        heapq.heapreplace(ends, (low + 1 / uplinks[number].rate, number))
    if suffices(low):
        return low
    high = max((count + uplink.busy) / uplink.rate for uplink in uplinks)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    # The time at which somebody is done with a piece: a moment earlier is not enough.
    return max((u.busy + n) / u.rate for u in uplinks if (n := u.within(high)))


class _Flow:
    """Whole pieces from groups to uplinks, pushed along shortest paths (Edmonds and Karp)."""

    def __init__(
        self,
        groups: Mapping[frozenset[str], int],
        takers: Mapping[frozenset[str], frozenset[str]],
        uplinks: Sequence[Uplink],
    ) -> None:
        self._uplinks = uplinks
        self._groups = sorted(groups, key=lambda group: (len(takers[group]), sorted(group)))
        self._left: dict[_Vertex, dict[_Vertex, int]] = {_START: {}, _ANY: {}, _END: {}}
        self._used: dict[tuple[_Vertex, _Vertex], int] = {}
        self._all = sum(groups.values())
        self.num_placed = 0
        for group in self._groups:
            self._widen(_START, ("group", group), groups[group])
            for host in sorted(takers[group]):
                self._widen(("group", group), ("host", host), self._all)
            self._widen(("group", group), _ANY, 0)
        for uplink in uplinks:
            self._widen(_ANY, ("host", uplink.host), 0)
            self._widen(("host", uplink.host), _END, 0)

    def open_room(self, carries: bool) -> None:
        """Whether pieces may be carried from now on."""
        if carries:
            for group in self._groups:
                self._widen(("group", group), _ANY, self._all)
            for uplink in self._uplinks:
                room = self._all if uplink.room is None else max(0, uplink.room)
                self._widen(_ANY, ("host", uplink.host), room)

    def raise_to(self, end: float) -> None:
        """Lets the uplinks bring what they can until then, and places as much as goes there."""
        for uplink in self._uplinks:
            self._widen(("host", uplink.host), _END, uplink.within(end))
        while path := self._path():
            width = min(self._left[here][there] for here, there in path)
            for here, there in path:
                self._left[here][there] -= width
                self._left[there][here] += width
                self._used[here, there] = self._used.get((here, there), 0) + width
            self.num_placed += width

    def portions(self) -> Portions:
        """What was placed."""
        found: dict[frozenset[str], dict[str, int]] = {}
        carried = {uplink.host: self._net(_ANY, ("host", uplink.host)) for uplink in self._uplinks}
        for group in self._groups:
            share = found[group] = {
                uplink.host: count
                for uplink in self._uplinks
                if (count := self._net(("group", group), ("host", uplink.host)))
            }
            left = self._net(("group", group), _ANY)
            for host in carried:
                taken = min(left, carried[host])
                carried[host], left = carried[host] - taken, left - taken
                if taken:
                    share[host] = share.get(host, 0) + taken
        return found

    def _net(self, here: _Vertex, there: _Vertex) -> int:
        return self._used.get((here, there), 0) - self._used.get((there, here), 0)

    def _widen(self, here: _Vertex, there: _Vertex, width: int) -> None:
        """So much in all may go there."""
        self._left.setdefault(here, {})[there] = width - self._net(here, there)
        self._left.setdefault(there, {}).setdefault(here, 0)

    def _path(self) -> list[tuple[_Vertex, _Vertex]]:
        """The shortest way on which there is still room; empty where there is none."""
        came: dict[_Vertex, _Vertex] = {_START: _START}
        queue: deque[_Vertex] = deque([_START])
        while queue and _END not in came:
            here = queue.popleft()
            for there, width in self._left[here].items():
                if width > 0 and there not in came:
                    came[there] = here
                    queue.append(there)
        path: list[tuple[_Vertex, _Vertex]] = []
        at: _Vertex = _END
        while at in came and at != _START:
            path.append((came[at], at))
            at = came[at]
        return path[::-1]
