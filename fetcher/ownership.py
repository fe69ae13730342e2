"""Who brings which piece into the cluster, and who takes it from a neighbour. Pure.

The network outside is slow and shared: every piece should cross it once. So each piece that nobody
holds gets one owner among the nodes that need it; the others borrow it inside.
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
    rate: float = 1.0
    """How fast it gets bytes from outside, in any unit; above 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """What one member does. Pieces that it holds already are in none of the sets."""

    owned: frozenset[int]
    """Brought in from outside, by this member alone."""
    lent: frozenset[int]
    """Those of `owned` that others wait for."""
    borrowed: frozenset[int]
    """Taken from other members."""
    partners: tuple[str, ...]
    """Addresses of all others."""


def assign_roles(members: Sequence[Member]) -> Mapping[str, Role]:
    """One owner for each wanted piece that nobody holds, so that all owners end about together.

    A piece that only one member wants is its own. The others go, in order, to that of their
    takers which would have it first; pieces count as equally large. Deterministic.
    """
    held = frozenset().union(*(member.held for member in members))
    takers: dict[int, list[Member]] = {}
    for member in members:
        for piece in member.wanted - held:
            takers.setdefault(piece, []).append(member)
    busy_s = {member.host: 0.0 for member in members}
    owner: dict[int, str] = {}
    # Pieces without a choice first: they say how much each owner has to do anyway.
    for piece in sorted(takers, key=lambda piece: (len(takers[piece]), piece)):
        first = min(takers[piece], key=lambda m: (busy_s[m.host] + 1 / m.rate, m.host))
        owner[piece] = first.host
        busy_s[first.host] += 1 / first.rate
    roles = {}
    for member in members:
        missing = member.wanted - member.held
        owned = frozenset(piece for piece in missing if owner.get(piece) == member.host)
        roles[member.host] = Role(
            owned=owned,
            lent=frozenset(piece for piece in owned if len(takers[piece]) > 1),
            borrowed=missing - owned,
            partners=tuple(other.address for other in members if other.host != member.host),
        )
    return roles
