"""The KV blocks that are free. Every stage has the same blocks, so their ids are global."""

from collections.abc import Iterable, Sequence

from ...settings import KV_BLOCK_TOKENS


def blocks_for(num_tokens: int) -> int:
    """KV blocks that hold the keys and values of `num_tokens` tokens."""
    return -(-num_tokens // KV_BLOCK_TOKENS)


class BlockPool:
    """Hands out block ids ``0 .. num_blocks``; knows which are free, not who holds the others.

    A run of blocks comes out in ascending order where it can: stages read blocks that lie side by
    side without copying them.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._is_free = bytearray(b"\1" * num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether so many blocks are free."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; ValueError unless `can_allocate` them."""
        if not 0 <= count <= len(self._free):
            raise ValueError(f"{count} blocks of {len(self._free)} free ones")
        first_kept = len(self._free) - count
        block_ids = self._free[first_kept:][::-1]
        del self._free[first_kept:]
        for block_id in block_ids:
            self._is_free[block_id] = 0
        return block_ids

    def free(self, block_ids: Sequence[int]) -> None:
        """Give blocks back; ValueError when one of them is free already."""
        for block_id in block_ids:
            if self._is_free[block_id]:
                raise ValueError(f"block {block_id} is free already")
            self._is_free[block_id] = 1
        self._free.extend(reversed(block_ids))

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that every block is either free or once among `held`. For tests: slow."""
        held = list(held)
        assert len(set(held)) == len(held), "a block is held twice"
        assert sorted([*held, *self._free]) == list(range(self.num_blocks)), "a block is lost"
        assert all(self._is_free[block_id] for block_id in self._free)
        assert not any(self._is_free[block_id] for block_id in held)
