"""The pool of KV blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.engine.blocks import BlockPool, blocks_for
from magnetar.settings import KV_BLOCK_TOKENS


def test_blocks_for_rounds_up() -> None:
    sizes = (0, 1, KV_BLOCK_TOKENS, KV_BLOCK_TOKENS + 1)
    assert [blocks_for(size) for size in sizes] == [0, 1, 1, 2]


def test_a_run_of_blocks_lies_side_by_side_and_comes_back_so() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pool.free(first)
    assert pool.allocate(3) == [0, 1, 2]


def test_refuses_more_than_there_is_and_changes_nothing() -> None:
    pool = BlockPool(2)
    assert not pool.can_allocate(3)
    with pytest.raises(ValueError, match="3 blocks of 2 free ones"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_refuses_a_block_that_is_free_already() -> None:
    pool = BlockPool(2)
    taken = pool.allocate(1)
    pool.free(taken)
    with pytest.raises(ValueError, match="block 0 is free already"):
        pool.free(taken)


@given(st.lists(st.integers(-4, 4), max_size=60))
def test_every_block_is_free_or_held_once(moves: list[int]) -> None:
    pool = BlockPool(12)
    held: list[list[int]] = []
    for move in moves:
        if move > 0 and pool.can_allocate(move):
            held.append(pool.allocate(move))
        elif move < 0 and held:
            pool.free(held.pop(move % len(held)))
        pool.check_integrity(block_id for block_ids in held for block_id in block_ids)
