"""The pool of KV blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.engine.blocks import (
    BlockPool,
    block_digest,
    blocks_for,
    prompt_digests,
    root_digest,
)
from magnetar.serve.engine.request import GenerationParams, Request
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


def filled(pool: BlockPool, *names: bytes) -> list[int]:
    """Blocks of one request that holds `names`."""
    block_ids = pool.allocate(len(names))
    for block_id, name in zip(block_ids, names, strict=True):
        pool.publish(block_id, name)
    return block_ids


def test_a_digest_tells_all_tokens_before_and_the_salt() -> None:
    root, tokens = root_digest(""), list(range(KV_BLOCK_TOKENS))
    first = block_digest(root, tokens)
    digests = {
        first,
        block_digest(first, tokens),
        block_digest(root, tokens[::-1]),
        block_digest(root_digest("mine"), tokens),
    }
    assert len(digests) == 4
    assert first == block_digest(root_digest(""), list(range(KV_BLOCK_TOKENS)))


@given(prompt=st.lists(st.integers(0, 2**31), min_size=1, max_size=70), salt=st.text(max_size=3))
def test_a_prompt_has_the_digests_that_its_request_will_have(prompt: list[int], salt: str) -> None:
    params = GenerationParams(max_tokens=1, cache_salt=salt)
    request = Request(request_id=0, prompt_ids=tuple(prompt), params=params)
    assert list(prompt_digests(prompt, salt)) == list(request.cacheable_digests())


def test_the_longest_known_beginning_is_found() -> None:
    pool = BlockPool(8)
    block_ids = filled(pool, b"a", b"ab", b"abc")
    assert pool.match([b"a", b"ab", b"abX", b"abc"]) == block_ids[:2]
    assert pool.match([b"x", b"ab"]) == []


def test_a_shared_block_is_free_when_its_last_reader_ends() -> None:
    pool = BlockPool(4)
    first = filled(pool, b"a", b"ab")
    second = pool.allocate(1, first)
    assert second[:2] == first
    pool.free(first)
    assert pool.num_free == 1
    pool.free(second)
    assert pool.num_free == 4
    with pytest.raises(ValueError, match="block 0 is free already"):
        pool.free(first[:1])


def test_a_free_block_that_is_shared_again_counts_as_taken() -> None:
    pool = BlockPool(3)
    known = filled(pool, b"a", b"ab")
    pool.free(known)
    assert pool.can_allocate(3)
    assert pool.can_allocate(1, known)
    assert not pool.can_allocate(2, known)
    with pytest.raises(ValueError, match="2 blocks of 3 free ones"):
        pool.allocate(2, known)
    assert pool.allocate(1, known) == [*known, 2]


def test_blank_blocks_go_first_then_the_tails_of_what_was_given_back_first() -> None:
    pool = BlockPool(6)
    old, new = filled(pool, b"a", b"ab"), filled(pool, b"x", b"xy")
    pool.free(old)
    pool.free(new)
    assert pool.allocate(2) == [4, 5]
    pool.allocate(1)
    assert (pool.match([b"a", b"ab"]), pool.match([b"x", b"xy"])) == (old[:1], new)
    pool.allocate(2)
    assert (pool.match([b"a"]), pool.match([b"x", b"xy"])) == ([], new[:1])


def test_what_was_used_again_lives_longer() -> None:
    pool = BlockPool(2)
    old, new = filled(pool, b"a"), filled(pool, b"x")
    pool.free(old)
    pool.free(new)
    pool.free(pool.allocate(0, old))
    pool.allocate(1)
    assert (pool.match([b"a"]), pool.match([b"x"])) == (old, [])


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    pool = BlockPool(3)
    first, second = filled(pool, b"a"), filled(pool, b"a")
    assert pool.match([b"a"]) == first
    pool.free(first)
    pool.free(second)
    pool.check_integrity(())
    assert pool.match([b"a"]) == first


MOVES = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 2), max_size=4)), max_size=60)


@given(MOVES)
def test_every_block_is_free_or_read_and_keeps_what_it_was_published_with(
    moves: list[tuple[int, list[int]]],
) -> None:
    """Each move is a request with a few own blocks after a path in a tree of contents."""
    pool = BlockPool(12)
    held: list[list[int]] = []
    contents: dict[int, bytes] = {}
    for count, path in moves:
        digests = [bytes(path[: depth + 1]) for depth in range(len(path))]
        shared = pool.match(digests)
        assert [contents[block_id] for block_id in shared] == digests[: len(shared)]
        missing = len(digests) - len(shared) + count
        if pool.can_allocate(missing, shared):
            block_ids = pool.allocate(missing, shared)
            assert len(set(block_ids)) == len(block_ids)
            read = {block_id for others in held for block_id in others}
            assert read.isdisjoint(block_ids[len(shared) :])
            for block_id, digest in zip(block_ids, digests, strict=False):
                pool.publish(block_id, digest)
                contents[block_id] = digest
            held.append(block_ids)
        elif held:
            pool.free(held.pop(len(path) % len(held)))
        pool.check_integrity(block_id for block_ids in held for block_id in block_ids)


def test_a_forgotten_block_is_found_by_nobody_whether_it_is_read_or_free() -> None:
    pool = BlockPool(4)
    read, given_back = filled(pool, b"a"), filled(pool, b"x")
    pool.free(given_back)
    pool.forget([*read, *given_back])
    assert (pool.match([b"a"]), pool.match([b"x"])) == ([], [])
    pool.check_integrity(read)
    pool.free(read)
    pool.check_integrity([])
