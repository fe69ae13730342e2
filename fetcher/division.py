"""When the work of a cluster that fetches together is to be divided anew. Pure.

`assign_roles` says who brings what; this says that an owner is lost, brings nothing, or is far
behind the others, from what the members report about themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from .ownership import Member

STALL_S: Final = 8.0
"""An owner to whom nothing comes for so long owes nothing any more, if another can bring it."""
BEHIND_S: Final = 10.0
"""An owner that needs so much longer than one who is done gives some of its work away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a member is with its role."""

    owes: int
    """Pieces to bring from outside that are not there yet."""
    lacks: int
    """Pieces to take from others that are not there yet."""
    received_bytes: int
    """Payload that came from anywhere."""


@dataclass(kw_only=True, slots=True)
class _Watched:
    began_s: float
    moved_s: float
    last: Standing
    owed: int
    """At the last division."""
    done_s: float | None = None
    """When nothing was owed any more."""

    def rate(self, now_s: float) -> float | None:
        """Owned pieces a second since the last division; None where that says nothing."""
        brought, seconds = self.owed - self.last.owes, (self.done_s or now_s) - self.began_s
        return brought / seconds if brought > 0 and seconds > 0 else None


class Division:
    """Watches the members of one cluster; `observe` now and then, `members` for `assign_roles`."""

    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._silent: set[str] = set()
        self._apart: set[str] = set()
        self._waited: set[str] = set()
        self._rates: dict[str, float] = {}
        self._divided_s: float | None = None

    def observe(self, standings: Mapping[str, Standing], now_s: float) -> bool:
        """Takes a report of every member there is; whether the work should be divided anew.

        A member that was there before and reports no more is lost.
        """
        if self._divided_s is None:
            self._divided_s = now_s
        lost = self._watched.keys() - standings.keys()
        for host in lost:
            del self._watched[host]
        for host, standing in standings.items():
            self._note(host, standing, now_s)
        findings = (self._finds_stalled(now_s), self._finds_waiting(now_s), self._is_uneven(now_s))
        return bool(lost) or any(findings)

    def members(self, members: Sequence[Member], now_s: float) -> list[Member]:
        """The same members, with what was learnt of them; the division begins anew from here."""
        for host, watched in self._watched.items():
            if (rate := watched.rate(now_s)) is not None:
                self._rates[host] = rate
        known = [self._rates[member.host] for member in members if member.host in self._rates]
        usual = sum(known) / len(known) if known else 1.0
        self._watched.clear()
        self._divided_s = now_s
        return [
            replace(
                member,
                # Measured against the others; before anything is measured, what was given counts.
                rate=self._rates.get(member.host, usual) if known else member.rate,
                has_way_out=member.has_way_out and member.host not in self._silent,
                is_apart=member.host in self._apart,
                begun=frozenset() if member.host in self._silent else member.begun,
            )
            for member in members
        ]

    def _note(self, host: str, standing: Standing, now_s: float) -> None:
        watched = self._watched.get(host)
        if watched is None:
            watched = _Watched(began_s=now_s, moved_s=now_s, last=standing, owed=standing.owes)
            self._watched[host] = watched
        if standing.received_bytes != watched.last.received_bytes:
            watched.moved_s = now_s
            if watched.last.owes:
                self._silent.discard(host)
        if not standing.owes and watched.done_s is None:
            watched.done_s = now_s
        watched.last = standing

    def _finds_stalled(self, now_s: float) -> bool:
        """Owners that bring nothing, while somebody else does or has."""
        able = [
            host
            for host, watched in self._watched.items()
            if host not in self._silent
            and (not watched.last.owes or now_s - watched.moved_s < STALL_S)
        ]
        stalled = {
            host
            for host, watched in self._watched.items()
            if host not in self._silent and watched.last.owes and now_s - watched.moved_s >= STALL_S
        }
        if able:
            self._silent |= stalled
        elif self._silent:
            # Nobody is left but those that brought nothing before: their turn again.
            self._silent = stalled
        else:
            return False
        return bool(stalled)

    def _finds_waiting(self, now_s: float) -> bool:
        """Members that get nothing although nobody owes anything: roles or links are not right."""
        if any(watched.last.owes for watched in self._watched.values()):
            return False
        waiting = {
            host
            for host, watched in self._watched.items()
            if watched.last.lacks and now_s - watched.moved_s >= STALL_S
        }
        # Once, the pieces may only have been lost where they were; twice, it is the link.
        self._apart |= waiting & self._waited
        self._waited |= waiting
        return bool(waiting)

    def _is_uneven(self, now_s: float) -> bool:
        """One is done, and another still has long to go."""
        assert self._divided_s is not None
        if now_s - self._divided_s < BEHIND_S:
            return False
        able = [watched for host, watched in self._watched.items() if host not in self._silent]
        is_one_done = any(watched.owed and watched.done_s is not None for watched in able)
        return is_one_done and any(
            watched.last.owes > BEHIND_S * rate
            for watched in able
            if watched.last.owes and (rate := watched.rate(now_s)) is not None
        )
