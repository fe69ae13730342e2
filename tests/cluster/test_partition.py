"""The cut of a chain: exact against brute force, even, and within every memory."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.planning.partition import Seat, partition


def one_stage_seats(*capacities: int) -> list[Seat]:
    return [Seat(num_stages=1, capacity=capacity) for capacity in capacities]


def all_cuts(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    return [(*inner, num_layers) for inner in combinations(range(1, num_layers), num_stages - 1)]


def fits(ends: tuple[int, ...], need: list[int], seats: list[Seat]) -> bool:
    start = stage = 0
    for seat in seats:
        end = ends[stage + seat.num_stages - 1]
        if sum(need[start:end]) > seat.capacity:
            return False
        start, stage = end, stage + seat.num_stages
    return True


def stage_costs(ends: tuple[int, ...], cost: list[int]) -> list[int]:
    return [sum(cost[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True)]


def test_equal_layers_are_cut_evenly() -> None:
    assert partition([1] * 8, [1] * 8, one_stage_seats(8, 8, 8, 8)) == (2, 4, 6, 8)


def test_a_heavy_last_layer_gets_fewer_companions() -> None:
    assert partition([1, 1, 1, 1, 4], [1] * 5, one_stage_seats(9, 9)) == (4, 5)


def test_a_small_memory_moves_the_cut() -> None:
    assert partition([1] * 6, [1] * 6, one_stage_seats(1, 9)) == (1, 6)


def test_none_when_nothing_fits() -> None:
    assert partition([1] * 6, [1] * 6, one_stage_seats(2, 3)) is None


def test_none_when_there_are_more_stages_than_layers() -> None:
    assert partition([1], [1], one_stage_seats(5, 5)) is None


def test_stages_of_one_seat_share_its_memory_unequally_if_need_be() -> None:
    assert partition([1, 1, 6], [1, 1, 6], [Seat(num_stages=2, capacity=8)]) == (2, 3)


@settings(max_examples=200, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    seats=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=3),
)
def test_is_the_best_and_most_even_of_all_cuts(
    layers: list[tuple[int, int]], seats: list[tuple[int, int]]
) -> None:
    cost, need = [c for c, _ in layers], [n for _, n in layers]
    chairs = [Seat(num_stages=count, capacity=capacity) for count, capacity in seats]
    num_stages = sum(count for count, _ in seats)
    possible = [cut for cut in all_cuts(len(cost), num_stages) if fits(cut, need, chairs)]

    ends = partition(cost, need, chairs)

    if not possible:
        assert ends is None
        return
    assert ends in possible
    scores = {
        cut: (max(stage_costs(cut, cost)), sum(c * c for c in stage_costs(cut, cost)), cut)
        for cut in possible
    }
    assert scores[ends] == min(scores.values())
