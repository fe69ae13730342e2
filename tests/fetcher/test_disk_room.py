from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.torrent.disk_room import MAX_RETRY_S, RESERVE_BYTES, RETRY_S, DiskRoom

amounts = st.integers(0, 4 * RESERVE_BYTES)


@given(st.lists(amounts, min_size=1), amounts)
def test_what_fits_is_never_held_up(frees: list[int], missing: int) -> None:
    room = DiskRoom()
    for now_s, free in enumerate(frees):
        room.look(free, missing, now_s)

    assert not room.look(max(missing, frees[-1]), missing, len(frees))


@given(amounts, amounts)
def test_waits_where_the_reserve_would_be_used_up_and_not_for_the_last_bytes(
    free: int, missing: int
) -> None:
    is_short = DiskRoom().look(free, missing, 0.0)

    assert is_short == (free < RESERVE_BYTES < missing)


def test_does_not_flutter_about_the_reserve() -> None:
    room, missing = DiskRoom(), 8 * RESERVE_BYTES

    assert room.look(RESERVE_BYTES - 1, missing, 0.0)
    assert room.look(RESERVE_BYTES + 1, missing, 1.0)
    assert not room.look(2 * RESERVE_BYTES, missing, 2.0)
    assert not room.look(RESERVE_BYTES + 1, missing, 3.0)


def test_a_failed_write_counts_whatever_the_disk_says_and_is_tried_ever_more_rarely() -> None:
    room, now_s, waits = DiskRoom(), 0.0, []
    for _ in range(9):
        began_s = now_s
        room.ran_full(now_s)
        room.ran_full(now_s)  # Several writes fail together.
        while room.look(1 << 40, 1000, now_s):
            now_s += 1.0
        waits.append(now_s - began_s)

    assert waits[:3] == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S]
    assert waits[-1] == MAX_RETRY_S


def test_after_a_failed_write_there_must_be_room_for_the_rest() -> None:
    room = DiskRoom()
    room.ran_full(0.0)

    assert room.look(999, 1000, 60.0)
    assert room.has_failed
    assert not room.look(1000, 1000, 61.0)
    assert not room.has_failed
