import threading
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.arrival import Arrival
from magnetar.fetcher.piece_map import ByteRange, PieceMap
from magnetar.fetcher.waves import HIGHEST, LOWEST, Waves, waves_of

NUM_PIECES = 24
pieces = st.frozensets(st.integers(0, NUM_PIECES - 1))
some_waves = st.lists(pieces, max_size=12)


@given(some_waves)
def test_every_piece_is_in_the_first_wave_that_wants_it_and_in_no_other(
    wanted: list[frozenset[int]],
) -> None:
    waves = Waves.of(*wanted)
    assert waves.pieces == frozenset().union(*wanted)
    assert sum(map(len, waves.waves)) == len(waves.pieces)
    firsts = [
        min(number for number, wave in enumerate(wanted) if piece in wave)
        for wave in waves.waves
        for piece in wave
    ]
    assert firsts == sorted(firsts)


@given(some_waves, pieces)
def test_a_part_of_them_keeps_the_order_and_what_nobody_ordered_comes_last(
    wanted: list[frozenset[int]], part: frozenset[int]
) -> None:
    whole = Waves.of(*wanted)
    waves = whole.within(part)
    assert waves.pieces == part
    at = {piece: number for number, wave in enumerate(waves.waves) for piece in wave}
    rank = {piece: number for number, wave in enumerate(whole.waves) for piece in wave}
    for one in part:
        for other in part:
            if rank.get(one, len(wanted)) < rank.get(other, len(wanted)):
                assert at[one] < at[other]


@given(some_waves, some_waves)
def test_waves_side_by_side_have_all_pieces_of_both_each_no_later(
    one: list[frozenset[int]], other: list[frozenset[int]]
) -> None:
    both = Waves(tuple(one)).beside(Waves(tuple(other)))
    assert both.pieces == frozenset().union(*one, *other)
    for waves in (one, other):
        for number, wave in enumerate(waves):
            assert wave <= frozenset().union(*both.waves[: number + 1])


@given(some_waves, pieces)
def test_priorities_fall_with_the_waves_and_exactly_the_wanted_have_one(
    wanted: list[frozenset[int]], there: frozenset[int]
) -> None:
    waves = Waves.of(*wanted)
    have = [piece in there for piece in range(NUM_PIECES)]
    front = waves.front(have)
    priorities = waves.priorities(front, NUM_PIECES)

    assert {piece for piece, level in enumerate(priorities) if level} == waves.pieces
    levels = [{priorities[piece] for piece in wave} for wave in waves.waves]
    assert all(len(level) == 1 for level in levels)
    flat = [level for of_wave in levels for level in of_wave]
    assert flat == sorted(flat, reverse=True)
    missing = waves.pieces - there
    if missing:
        lacking = [number for number, wave in enumerate(waves.waves) if wave & missing]
        assert front == lacking[0]
        assert flat[front] == HIGHEST
        # A lower wave never comes before a higher one, as far as there are levels.
        assert all(one > two or one == LOWEST for one, two in pairwise(flat[front:]))
    else:
        assert front == len(waves.waves)


@given(st.lists(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 10)), max_size=3)))
def test_steps_of_a_plan_become_the_pieces_they_touch(steps: list[list[tuple[int, int]]]) -> None:
    piece_map = PieceMap.of_files({"w": 100}, piece_length=7)
    ranges = [[ByteRange("w", offset, count) for offset, count in step] for step in steps]
    waves = waves_of(ranges, piece_map)
    done: set[int] = set()
    for step in steps:
        done |= {byte // 7 for offset, count in step for byte in range(offset, offset + count)}
        so_far = Waves.of(*waves.waves).within(frozenset(done))
        assert so_far.pieces == done
    assert waves.pieces == done


def test_who_waits_for_pieces_hears_of_them_and_of_their_loss() -> None:
    arrival = Arrival()
    assert arrival.wait([], 0)
    assert not arrival.wait([1], 0)
    heard: list[bool] = []
    thread = threading.Thread(target=lambda: heard.append(arrival.wait([1, 2], 10)), name="waits")
    thread.start()
    arrival.tell(frozenset({1}))
    arrival.tell(frozenset({1, 2}))
    thread.join(10)
    assert heard == [True]
    arrival.tell(frozenset({2}))
    assert not arrival.wait([1], 0)


@given(some_waves, pieces, st.integers(1, 30))
def test_parts_hold_every_piece_once_and_in_order(
    wanted: list[frozenset[int]], there: frozenset[int], num_parts: int
) -> None:
    waves = Waves.of(*wanted)
    order = [piece for wave in waves.waves for piece in sorted(wave)]
    have = [piece in there for piece in range(NUM_PIECES)]
    parts = waves.parts(have, num_parts)
    assert len(parts) == num_parts
    held, taken = [piece in there for piece in order], 0
    for number, part in enumerate(parts, start=1):
        size = len(order) * number // num_parts - taken
        mine = held[taken : taken + size]
        assert part == (sum(mine) / size if size else 0.0)
        taken += size
    assert taken == len(order)
