from collections.abc import Mapping, Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.uplink import Uplink, portions

HOSTS = "abcd"
Groups = Mapping[frozenset[str], int]


@st.composite
def uplinks(draw: st.DrawFn, *, max_count: int, is_roomy: bool) -> list[Uplink]:
    rooms = st.none() if is_roomy else st.one_of(st.none(), st.integers(0, 3))
    return [
        Uplink(
            host=host,
            rate=draw(st.sampled_from([0.3, 1.0, 1.7, 4.0])),
            busy=draw(st.integers(0, 3)),
            room=draw(rooms),
        )
        for host in HOSTS[: draw(st.integers(1, max_count))]
    ]


def groups(max_pieces: int) -> st.SearchStrategy[dict[frozenset[str], int]]:
    """Hosts that want the same number up to so many pieces; some of them have no uplink."""
    some = st.frozensets(st.sampled_from(HOSTS), min_size=1)
    return st.dictionaries(some, st.integers(1, max_pieces), max_size=3)


def ends(shares: Mapping[frozenset[str], Mapping[str, int]], ways: Sequence[Uplink]) -> float:
    """When the last of those is done that have anything to bring."""
    brought = {way: sum(share.get(way.host, 0) for share in shares.values()) for way in ways}
    return max(((way.busy + n) / way.rate for way, n in brought.items() if n), default=0.0)


def num_carried(shares: Mapping[frozenset[str], Mapping[str, int]], host: str) -> int:
    return sum(share.get(host, 0) for group, share in shares.items() if host not in group)


def best(wanted: Groups, ways: Sequence[Uplink]) -> tuple[float, int] | None:
    """The soonest end and the fewest pieces carried then, by trying all divisions."""
    pieces = [group for group, count in wanted.items() for _ in range(count)]
    found = []
    for owners in product(ways, repeat=len(pieces)):
        carried = [way for group, way in zip(pieces, owners, strict=True) if way.host not in group]
        if any(way.room is not None and carried.count(way) > way.room for way in ways):
            continue
        last = max(((w.busy + owners.count(w)) / w.rate for w in set(owners)), default=0.0)
        found.append((round(last, 6), len(carried)))
    return min(found, default=None)


@given(groups(2), uplinks(max_count=3, is_roomy=False))
def test_ends_soonest_and_carries_the_fewest_pieces(wanted: Groups, ways: list[Uplink]) -> None:
    shares = portions(wanted, ways)
    expected = best(wanted, ways)
    if expected is not None:
        carried = [num_carried(shares, way.host) for way in ways]
        assert (round(ends(shares, ways), 6), sum(carried)) == expected
        rooms = [way.room for way in ways]
        assert all(r is None or n <= r for n, r in zip(carried, rooms, strict=True))
    assert {group: sum(share.values()) for group, share in shares.items()} == wanted


@given(groups(400), uplinks(max_count=4, is_roomy=True))
def test_nobody_ends_before_all_uplinks_together_could(wanted: Groups, ways: list[Uplink]) -> None:
    end = ends(portions(wanted, ways), ways)
    # A moment sooner they would not have brought all.
    assert sum(way.within(end - 1e-6) for way in ways) < max(1, sum(wanted.values()))


@given(groups(400), uplinks(max_count=4, is_roomy=False))
def test_nobody_carries_more_than_it_is_roomy_for(wanted: Groups, ways: list[Uplink]) -> None:
    shares = portions(wanted, ways)
    assert {group: sum(share.values()) for group, share in shares.items()} == wanted
    needy = sum(n for group, n in wanted.items() if not group & {way.host for way in ways})
    if any(way.room is None for way in ways) or needy <= sum(way.room or 0 for way in ways):
        for way in ways:
            assert way.room is None or num_carried(shares, way.host) <= way.room


def test_carries_nothing_where_shares_are_even() -> None:
    ways = [Uplink(host=host, rate=1.0) for host in HOSTS]
    wanted = {frozenset(host): 100 for host in HOSTS} | {frozenset(HOSTS): 40}
    shares = portions(wanted, ways)
    assert [num_carried(shares, host) for host in HOSTS] == [0, 0, 0, 0]
    assert ends(shares, ways) == 110


def test_without_room_the_slow_one_brings_its_own() -> None:
    ways = [Uplink(host="a", rate=1.0), Uplink(host="b", rate=4.0, room=30)]
    wanted = {frozenset("a"): 100, frozenset("b"): 50}
    assert portions(wanted, ways) == {
        frozenset("a"): {"a": 70, "b": 30},
        frozenset("b"): {"b": 50},
    }


def test_carried_pieces_are_spread_by_rate() -> None:
    ways = [Uplink(host="a", rate=1.0), Uplink(host="b", rate=4.0), Uplink(host="c", rate=2.0)]
    assert portions({frozenset("a"): 70}, ways) == {frozenset("a"): {"a": 10, "b": 40, "c": 20}}


def test_what_nobody_with_an_uplink_wants_is_carried_beyond_the_room() -> None:
    ways = [Uplink(host="a", rate=1.0, room=2), Uplink(host="b", rate=1.0, room=0)]
    assert portions({frozenset("z"): 10}, ways) == {frozenset("z"): {"a": 5, "b": 5}}
    assert portions({frozenset("z"): 2}, ways) == {frozenset("z"): {"a": 2}}
