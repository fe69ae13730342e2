from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.ownership import Member, Role, assign_roles

pieces = st.frozensets(st.integers(0, 30))


@st.composite
def clusters(draw: st.DrawFn) -> list[Member]:
    return [
        Member(
            host=f"h{number}",
            address=f"10.0.0.{number}:1",
            wanted=draw(pieces),
            held=draw(pieces),
            rate=draw(st.sampled_from([0.5, 1.0, 4.0])),
        )
        for number in range(draw(st.integers(1, 5)))
    ]


@given(clusters())
def test_every_missing_piece_crosses_once_and_everybody_gets_what_it_wants(
    members: list[Member],
) -> None:
    roles = assign_roles(members)

    held = frozenset().union(*(member.held for member in members))
    wanted = frozenset().union(*(member.wanted for member in members))
    owned = [piece for role in roles.values() for piece in role.owned]
    assert sorted(owned) == sorted(wanted - held)
    for member in members:
        role = roles[member.host]
        assert role.owned | role.borrowed == member.wanted - member.held
        assert not role.owned & role.borrowed
        assert role.borrowed <= held | frozenset(owned)
        others = [other for other in members if other is not member]
        assert set(role.partners) == {other.address for other in others}
        borrowed_by_others = [roles[other.host].borrowed for other in others]
        assert role.lent == role.owned & frozenset().union(*borrowed_by_others)


def owned_bytes(rates: list[float], own: int, common: int) -> list[int]:
    """Pieces that each of the nodes brings, of `own` for each and `common` to all."""
    shared = frozenset(range(common))
    members = [
        Member(
            host=f"h{number}",
            address="",
            wanted=shared | frozenset(range(1000 * (number + 1), 1000 * (number + 1) + own)),
            held=frozenset(),
            rate=rate,
        )
        for number, rate in enumerate(rates)
    ]
    roles: dict[str, Role] = dict(assign_roles(members))
    return [len(roles[member.host].owned) for member in members]


def test_common_pieces_are_spread_by_rate() -> None:
    assert owned_bytes([1.0, 1.0, 1.0, 1.0], own=20, common=40) == [30, 30, 30, 30]
    assert owned_bytes([3.0, 1.0], own=0, common=40) == [30, 10]
    # A slow node that is late with its own pieces brings none of the common ones.
    assert owned_bytes([1.0, 0.1], own=10, common=20) == [30, 10]


def test_what_is_in_the_cluster_is_not_fetched_again() -> None:
    some = frozenset(range(8))
    old = Member(host="old", address="a:1", wanted=some, held=some)
    new = Member(host="new", address="b:1", wanted=some | {9}, held=frozenset({0}))

    roles = assign_roles([old, new])

    assert roles["old"] == Role(
        owned=frozenset(), lent=frozenset(), borrowed=frozenset(), partners=("b:1",)
    )
    assert roles["new"].owned == {9}
    assert roles["new"].borrowed == some - {0}
