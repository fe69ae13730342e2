"""Who brings which piece into the cluster, and who takes it from a neighbour. Pure.

The network outside is slow and shared: every piece should cross it once. So each piece that nobody
holds gets one owner among the nodes that have a way out; the others borrow it inside. An owner is
one of the nodes that need the piece, unless those have no way out, or one so slow that all is there
sooner when a faster node carries some of theirs: as many pieces as that takes, and those that are
needed last.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .uplink import Uplink, portions
from .waves import Waves


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
    order: Waves = field(default_factory=Waves)
    """In which order it needs what it wants; pieces in none of these come last."""
    room: int | None = None
    """Pieces that it may carry besides those it wants; None: any number."""
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
    carried: Waves = field(default_factory=Waves)
    """Those of `owned` that it does not need, in the order in which others need them. Wave by wave
    they come beside its own; some may be empty."""
    ready: frozenset[int] = frozenset()
    """Those of `borrowed` that another member holds already: they come before all else."""
    called: frozenset[str] = frozenset()
    """Those of `partners` that wait to be called."""


def assign_roles(members: Sequence[Member]) -> Mapping[str, Role]:
    """One owner for each wanted piece that nobody holds, so that the last owner ends soonest.

    A piece that was begun stays where it was begun. The others go where `portions` says: no more
    than that takes to nodes that do not want them, and no more than those have room for, but for
    pieces that none of their takers could bring. Pieces count as equally large. Deterministic.
    While nobody has a way out, each piece is still owned by one of its takers: it may come yet.
    """
    members = sorted(members, key=lambda member: member.host)
    together = [member for member in members if not member.is_apart]
    held = frozenset().union(*(member.held for member in together))
    takers: dict[int, list[Member]] = {}
    for member in together:
        for piece in member.wanted - held:
            takers.setdefault(piece, []).append(member)
    steps = _steps(takers)
    owned = _owned(takers, together, steps)
    roles = {}
    for member in members:
        missing = member.wanted - member.held
        own = missing if member.is_apart else frozenset(owned[member.host])
        roles[member.host] = Role(
            owned=own,
            lent=frozenset(
                piece
                for piece in owned.get(member.host, ())
                if any(taker.host != member.host for taker in takers[piece])
            ),
            borrowed=missing - own,
            carried=_in_steps(own - member.wanted, steps),
            ready=(missing - own) & held,
            partners=tuple(other.address for other in members if other.host != member.host),
            called=frozenset(other.address for other in members if other.calls_nobody),
        )
    return roles


def _owned(
    takers: Mapping[int, Sequence[Member]], together: Sequence[Member], steps: Mapping[int, int]
) -> dict[str, set[int]]:
    """By host, what it brings; of each group of takers each brings some of every step."""
    able = [member for member in together if member.has_way_out]
    owned: dict[str, set[int]] = {member.host: set() for member in together}
    begun = {piece: member for member in reversed(able) for piece in member.begun}
    for piece in takers.keys() & begun.keys():
        owned[begun[piece].host].add(piece)
    groups: dict[frozenset[str], list[int]] = {}
    for piece in sorted(takers.keys() - begun.keys(), key=lambda piece: (steps[piece], piece)):
        groups.setdefault(frozenset(taker.host for taker in takers[piece]), []).append(piece)
    if not groups:
        return owned
    uplinks = [
        Uplink(
            host=member.host,
            rate=member.rate,
            busy=len(owned[member.host]),
            room=member.room if able else 0,
        )
        for member in able or together
    ]
    counts = {group: len(pieces) for group, pieces in groups.items()}
    for group, share in portions(counts, uplinks).items():
        own = {host: count for host, count in share.items() if host in group}
        carried = {host: count for host, count in share.items() if host not in group}
        # Its own way out brings what a node loads first; that comes as it is loaded.
        turns = [*_turns(own), *_turns(carried)]
        for piece, host in zip(groups[group], turns, strict=True):
            owned[host].add(piece)
    return owned


def _turns(counts: Mapping[str, int]) -> list[str]:
    """Each host so many times, evenly."""
    turns = [
        ((number + 0.5) / count, host) for host, count in counts.items() for number in range(count)
    ]
    return [host for _, host in sorted(turns)]


def _steps(takers: Mapping[int, Sequence[Member]]) -> dict[int, int]:
    """The wave in which the first of its takers needs each piece."""
    steps: dict[int, int] = {}
    members = {taker.host: taker for each in takers.values() for taker in each}
    for member in members.values():
        for number, wave in enumerate(member.order.waves):
            for piece in wave & takers.keys() & member.wanted:
                steps[piece] = min(number, steps.get(piece, number))
    last = max((len(member.order.waves) for member in members.values()), default=0)
    return {piece: steps.get(piece, last) for piece in takers}


def _in_steps(pieces: Iterable[int], steps: Mapping[int, int]) -> Waves:
    waves: dict[int, set[int]] = {}
    for piece in pieces:
        waves.setdefault(steps[piece], set()).add(piece)
    return Waves(tuple(frozenset(waves.get(n, ())) for n in range(max(waves, default=-1) + 1)))
