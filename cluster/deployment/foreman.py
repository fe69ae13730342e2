"""Divides what the nodes of a cluster fetch together, and anew when one of them fails in it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from ...fetcher.division import Division
from ...fetcher.ownership import Member, Role, assign_roles

LOOK_S: Final = 1.0


class Crew(Protocol):
    """Calls the same method of the agents of several nodes at once.

    The result by host; a host whose agent is gone is missing from it.
    """

    def __call__(self, method: str, arguments: Mapping[str, tuple[Any, ...]]) -> Mapping[str, Any]:
        """`arguments` by host."""
        ...


class Foreman:
    """Hands out roles: `divide` once, then `look` again and again while the nodes download."""

    def __init__(
        self,
        crew: Crew,
        *,
        wan_mbps: Mapping[str, float] | None = None,
        lenders: Callable[[], Sequence[Member]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wan_mbps` says how fast hosts get bytes from outside, where that is known; 0: not.
        `lenders` are nodes that fetch nothing here and give what they hold, as things are now.
        """
        self._crew = crew
        self._wan_mbps = wan_mbps or {}
        self._lenders = lenders
        self._clock = clock
        self._division = Division()
        self._hosts: tuple[str, ...] = ()
        self._looked_s = clock()
        self.roles: Mapping[str, Role] = {}
        """As they were handed out last."""

    def divide(self, members: Mapping[str, Member]) -> None:
        """The first division, among these members."""
        self._hosts = tuple(members)
        self._hand_out(members)

    def look(self) -> frozenset[str]:
        """Hosts that have to download again, because there is something new for them to bring.

        Looks at most once in `LOOK_S`.
        """
        now_s = self._clock()
        if not self._hosts or now_s - self._looked_s < LOOK_S:
            return frozenset()
        self._looked_s = now_s
        standings = self._crew("standing", dict.fromkeys(self._hosts, ()))
        self._hosts = tuple(standings)
        if not self._division.observe(standings, now_s):
            return frozenset()
        self._hand_out(self._crew("member", dict.fromkeys(self._hosts, ())))
        return frozenset(host for host, role in self.roles.items() if role.owned or role.borrowed)

    def _hand_out(self, members: Mapping[str, Member]) -> None:
        given = [self._as_given(member) for member in members.values()]
        known = self._division.members(given, self._clock())
        roles = assign_roles([*known, *self._lenders()])
        self.roles = {host: roles[host] for host in members}
        self._crew("share", {host: (role,) for host, role in self.roles.items()})

    def _as_given(self, member: Member) -> Member:
        """A member whose rate is not given gets the mean of those that are."""
        if not self._wan_mbps:
            return member
        given = [rate for rate in self._wan_mbps.values() if rate > 0]
        usual = sum(given) / len(given) if given else member.rate
        rate = self._wan_mbps.get(member.host, usual)
        if rate <= 0:
            return replace(member, has_way_out=False)
        return replace(member, rate=rate)
