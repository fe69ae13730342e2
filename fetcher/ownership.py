"""Who brings which piece into the cluster, and who takes it from a neighbour. Pure.

The network outside is slow and shared: every piece should cross it once. So each piece that nobody
holds gets one owner among the nodes that need it and have a way out; the others borrow it inside.
Where none of those that need it has a way out, a node that has one carries it for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One node of a cluster that fetches together."""

    host: str
    address: str
    """``HOST:PORT`` where its torrent session listens for the others."""
    wanted: frozenset[int]
    held: frozenset[int]
    """Pieces on its disk, verified."""
    begun: frozenset[int] = frozenset()
    """Pieces of which it has a part already."""
    rate: float = 1.0
    """How fast it gets bytes from outside, in any unit; above 0."""
    has_way_out: bool = True
    """Whether it gets anything from outside at all."""
    is_apart: bool = False
    """The others do not reach it: it brings whatever it wants from outside by itself."""
    calls_nobody: bool = False
    """It waits for the others to connect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What one member does. Pieces that it holds already are in none of the sets."""

    owned: frozenset[int]
    """Brought in from outside, by this member alone; some of them perhaps for others only."""
    lent: frozenset[int]
    """Those of `owned` that others wait for."""
    borrowed: frozenset[int]
    """Taken from other members."""
    partners: tuple[str, ...]
    """Addresses of all others."""
    ready: frozenset[int] = frozenset()
    """Those of `borrowed` that another member holds already: they come before all else."""
    called: frozenset[str] = frozenset()
    """Those of `partners` that wait to be called."""


def assign_roles(members: Sequence[Member]) -> Mapping[str, Role]:
    """One owner for each wanted piece that nobody holds, so that all owners end about together.

    A piece that was begun stays where it was begun. One that only one member could bring is its
    own. The others go, in order, to that of their takers which would have it first; pieces count as
    equally large. Deterministic. A piece that no member with a way out could bring is still owned,
    by one of its takers: it may come yet.
    """
    members = sorted(members, key=lambda member: member.host)
    together = [member for member in members if not member.is_apart]
    held = frozenset().union(*(member.held for member in together))
    takers: dict[int, list[Member]] = {}
    for member in together:
        for piece in member.wanted - held:
            takers.setdefault(piece, []).append(member)
    carriers = [member for member in together if member.has_way_out]
    begun = {piece: member for member in reversed(carriers) for piece in member.begun}

    def choice(piece: int) -> list[Member]:
        able = [member for member in takers[piece] if member.has_way_out]
        return able or carriers or takers[piece]

    busy_s = {member.host: 0.0 for member in members}
    owner: dict[int, str] = {}

    def give(piece: int, member: Member) -> None:
        owner[piece] = member.host
        busy_s[member.host] += 1 / member.rate

    for piece in sorted(takers.keys() & begun.keys()):
        give(piece, begun[piece])
    choices = {piece: choice(piece) for piece in takers if piece not in owner}
    # Pieces without a choice first: they say how much each owner has to do anyway.
    for piece in sorted(choices, key=lambda piece: (len(choices[piece]), piece)):
        give(piece, min(choices[piece], key=lambda m: (busy_s[m.host] + 1 / m.rate, m.host)))
    owned: dict[str, set[int]] = {member.host: set() for member in members}
    for piece, host in owner.items():
        owned[host].add(piece)
    roles = {}
    for member in members:
        missing = member.wanted - member.held
        own = missing if member.is_apart else frozenset(owned[member.host])
        roles[member.host] = Role(
            owned=own,
            lent=frozenset(
                piece
                for piece in owned[member.host]
                if any(taker.host != member.host for taker in takers[piece])
            ),
            borrowed=missing - own,
            ready=(missing - own) & held,
            partners=tuple(other.address for other in members if other.host != member.host),
            called=frozenset(other.address for other in members if other.calls_nobody),
        )
    return roles
