from dataclasses import replace

from magnetar.fetcher.division import BEHIND_S, STALL_S, Division, Standing
from magnetar.fetcher.ownership import Member, assign_roles

PIECES_A_SECOND = 2


class Play:
    """A cluster of members that bring a few pieces each second, unless something is wrong."""

    def __init__(self, *members: Member) -> None:
        self.members = {member.host: member for member in members}
        self.rates = {host: float(PIECES_A_SECOND) for host in self.members}
        self.unreachable: set[str] = set()
        self.division = Division()
        self.now_s = 0.0
        self.received = dict.fromkeys(self.members, 0.0)
        self.brought: list[int] = []
        self.num_divisions = 0
        self.divide()

    def divide(self) -> None:
        self.num_divisions += 1
        known = self.division.members(tuple(self.members.values()), self.now_s)
        self.roles = dict(assign_roles(known))

    def second(self) -> None:
        """One second passes, and the driver looks once."""
        self.now_s += 1
        for host, member in self.members.items():
            role = self.roles[host]
            owed = sorted(role.owned - member.held)
            quota = self.rates[host] * self.now_s - sum(
                piece in role.owned for piece in member.held
            )
            new = owed[: max(0, min(int(quota), int(self.rates[host] + 0.5)))]
            self.brought += new
            there = frozenset().union(*(other.held for other in self.members.values()), frozenset())
            if not owed and host not in self.unreachable:
                new += sorted((role.borrowed & there) - member.held)
            self.received[host] += len(new)
            self.members[host] = replace(member, held=member.held | frozenset(new))
        standings = {
            host: Standing(
                owes=len(self.roles[host].owned - member.held),
                lacks=len(self.roles[host].borrowed - member.held),
                received_bytes=int(self.received[host]),
            )
            for host, member in self.members.items()
        }
        if self.division.observe(standings, self.now_s):
            self.divide()

    def until_done(self, limit_s: int) -> None:
        while any(member.wanted - member.held for member in self.members.values()):
            assert self.now_s < limit_s, self.roles
            self.second()


def node(host: str, wanted: range) -> Member:
    return Member(host=host, address=f"{host}:1", wanted=frozenset(wanted), held=frozenset())


def test_nothing_is_divided_anew_while_all_is_well() -> None:
    play = Play(node("a", range(40)), node("b", range(40)), node("c", range(30, 60)))
    play.until_done(40)
    assert play.num_divisions == 1
    assert sorted(play.brought) == list(range(60))


def test_what_a_lost_owner_owed_is_brought_by_the_others_once() -> None:
    play = Play(node("a", range(40)), node("b", range(40)), node("c", range(40)))
    for _ in range(3):
        play.second()
    del play.members["b"]
    play.until_done(60)
    assert play.num_divisions == 2
    again = [piece for piece in set(play.brought) if play.brought.count(piece) > 1]
    # Only what went down with it.
    assert len(again) <= 4 * PIECES_A_SECOND


def test_an_owner_that_stalls_gives_its_work_away_and_takes_it_from_the_others() -> None:
    play = Play(node("a", range(40)), node("b", range(40)))
    for _ in range(3):
        play.second()
    play.rates["b"] = 0.0
    play.until_done(40)
    assert not play.roles["b"].owned
    assert sorted(play.brought) == list(range(40))


def test_nothing_changes_while_nobody_outside_answers() -> None:
    play = Play(node("a", range(10)), node("b", range(10)))
    play.rates = {"a": 0.0, "b": 0.0}
    for _ in range(int(5 * STALL_S)):
        play.second()
    assert play.num_divisions == 1


def test_a_slow_owner_gives_work_to_those_who_are_done() -> None:
    play = Play(node("a", range(100)), node("b", range(100)))
    play.rates = {"a": 8.0, "b": 0.5}
    play.until_done(40)
    # By equal halves the slow one alone would have taken 100 s.
    assert BEHIND_S <= play.now_s < 40
    assert sorted(play.brought) == list(range(100))


def test_a_member_that_cannot_reach_its_partners_brings_everything_itself() -> None:
    play = Play(node("a", range(20)), node("b", range(20)))
    play.unreachable = {"b"}
    play.until_done(60)
    assert play.roles["b"].borrowed == frozenset()


def test_those_that_stalled_get_another_turn_when_nobody_else_is_left() -> None:
    play = Play(node("a", range(60)), node("b", range(60)))
    play.rates = {"a": 2.0, "b": 0.0}
    for _ in range(12):
        play.second()
    assert not play.roles["b"].owned
    play.rates = {"a": 0.0, "b": 2.0}
    play.until_done(120)
