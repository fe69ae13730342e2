from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.ownership import Member, Role, assign_roles
from magnetar.fetcher.waves import Waves

pieces = st.frozensets(st.integers(0, 30))


@st.composite
def clusters(draw: st.DrawFn) -> list[Member]:
    return [
        Member(
            host=f"h{number}",
            address=f"10.0.0.{number}:1",
            wanted=draw(pieces),
            held=draw(pieces),
            begun=draw(st.frozensets(st.integers(0, 30), max_size=3)),
            rate=draw(st.sampled_from([0.5, 1.0, 4.0])),
            has_way_out=draw(st.booleans()),
            is_apart=draw(st.sampled_from([False, False, False, True])),
        )
        for number in range(draw(st.integers(1, 5)))
    ]


@given(clusters())
def test_every_missing_piece_crosses_once_and_everybody_gets_what_it_wants(
    members: list[Member],
) -> None:
    roles = assign_roles(members)

    together = [member for member in members if not member.is_apart]
    held = frozenset().union(*(member.held for member in together))
    wanted = frozenset().union(*(member.wanted for member in together))
    owned = [piece for member in together for piece in roles[member.host].owned]
    assert sorted(owned) == sorted(wanted - held)
    for member in members:
        role = roles[member.host]
        missing = member.wanted - member.held
        assert role.owned | role.borrowed >= missing
        assert role.borrowed == missing - role.owned
        assert set(role.partners) == {
            other.address for other in members if other.host != member.host
        }
        if member.is_apart:
            assert role == Role(
                owned=missing, lent=frozenset(), borrowed=frozenset(), partners=role.partners
            )
            continue
        assert not role.owned & member.held
        assert role.borrowed <= held | frozenset(owned)
        assert role.ready == role.borrowed & held
        awaited = frozenset().union(
            *(roles[other.host].borrowed for other in together if other.host != member.host)
        )
        assert role.lent == role.owned & awaited


@given(clusters())
def test_only_those_with_a_way_out_bring_anything_while_there_are_any(
    members: list[Member],
) -> None:
    roles = assign_roles(members)
    together = [member for member in members if not member.is_apart]
    able = [member for member in together if member.has_way_out]
    for member in together:
        role = roles[member.host]
        if able and not member.has_way_out:
            assert not role.owned
        assert role.carried.pieces == role.owned - member.wanted


@given(clusters())
def test_does_not_depend_on_the_order_of_the_members(members: list[Member]) -> None:
    assert {host: role.owned for host, role in assign_roles(members[::-1]).items()} == {
        host: role.owned for host, role in assign_roles(members).items()
    }


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=5), st.integers(0, 200))
def test_common_pieces_are_balanced_within_one_piece_of_each(
    rates: list[float], num_pieces: int
) -> None:
    shared = frozenset(range(num_pieces))
    members = [
        Member(host=f"h{number}", address="", wanted=shared, held=frozenset(), rate=rate)
        for number, rate in enumerate(rates)
    ]
    roles = assign_roles(members)
    ends_s = [len(roles[member.host].owned) / member.rate for member in members]
    for member, end_s in zip(members, ends_s, strict=True):
        # Moving its last piece to anybody else would not end the whole sooner.
        if roles[member.host].owned:
            others = zip(members, ends_s, strict=True)
            assert all(end_s <= other_s + 1 / other.rate + 1e-9 for other, other_s in others)


def owned_pieces(rates: list[float], own: int, common: int) -> list[int]:
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
    assert owned_pieces([1.0, 1.0, 1.0, 1.0], own=20, common=40) == [30, 30, 30, 30]
    assert owned_pieces([3.0, 1.0], own=0, common=40) == [30, 10]
    # A slow node that is late with its own pieces brings none of the common ones.
    assert owned_pieces([1.0, 0.25], own=10, common=30) == [40, 10]


def test_a_faster_node_carries_what_a_slow_one_would_be_late_with() -> None:
    assert owned_pieces([1.0, 0.1], own=10, common=20) == [37, 3]
    assert owned_pieces([8.0, 4.0, 4.0, 2.0], own=45, common=0) == [80, 40, 40, 20]


def test_what_is_carried_is_what_its_taker_needs_last() -> None:
    steps = Waves.of(range(100, 110), range(50, 60), range(20))
    slow = Member(
        host="a", address="", wanted=steps.pieces, held=frozenset(), order=steps, rate=1.0
    )
    fast = Member(host="b", address="", wanted=frozenset(), held=frozenset(), rate=3.0)

    roles = assign_roles([slow, fast])

    assert roles["a"].owned == steps.waves[0]
    assert roles["b"].owned == roles["a"].borrowed == steps.waves[1] | steps.waves[2]
    assert roles["b"].carried == Waves((frozenset(), *steps.waves[1:]))


def test_common_pieces_of_each_step_come_from_all_at_once() -> None:
    steps = Waves.of(range(30, 60), range(30))
    roles = assign_roles(
        [
            Member(
                host=host, address="", wanted=steps.pieces, held=frozenset(), order=steps, rate=rate
            )
            for host, rate in {"a": 1.0, "b": 2.0}.items()
        ]
    )
    for step in steps.waves:
        assert [len(roles[host].owned & step) for host in "ab"] == [10, 20]


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


def test_a_node_with_a_way_out_carries_for_those_without_one() -> None:
    inside = Member(
        host="a", address="", wanted=frozenset(range(10)), held=frozenset(), has_way_out=False
    )
    busy = Member(host="b", address="", wanted=frozenset(range(20, 30)), held=frozenset())
    free = Member(host="c", address="", wanted=frozenset(), held=frozenset())

    roles = assign_roles([inside, busy, free])

    assert not roles["a"].owned
    assert roles["a"].borrowed == inside.wanted
    assert roles["b"].owned == busy.wanted
    assert roles["c"].owned == roles["c"].lent == inside.wanted
