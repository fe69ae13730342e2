"""The KV blocks: which are free, how many requests read each, and what the full ones hold.

Every stage has the same blocks, so their ids are global. A full block is known by the digest of all
tokens up to its end, so that a later request that begins alike takes the block instead of computing
it again. Digests are cryptographic and chained: equal ones mean equal tokens from the first on, and
no prompt can be crafted to be taken for somebody else's.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from ...settings import KV_BLOCK_TOKENS


def blocks_for(num_tokens: int) -> int:
    """KV blocks that hold the keys and values of `num_tokens` tokens."""
    return -(-num_tokens // KV_BLOCK_TOKENS)


def root_digest(cache_salt: str) -> bytes:
    """What the first block of a prompt is chained to; other salts never share a block."""
    # Half a surrogate pair is no reason to fail: it salts as well as anything.
    return hashlib.blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """What is known of a full block: its tokens, and through `parent` all those before."""
    return _digest(parent, array("I", token_ids).tobytes())


def prompt_digests(prompt_ids: Sequence[int], cache_salt: str) -> Iterator[bytes]:
    """Of the full blocks of a prompt but the one with its last token, which is always computed."""
    digest = root_digest(cache_salt)
    ids = array("I", prompt_ids)
    tokens, width = ids.tobytes(), KV_BLOCK_TOKENS * ids.itemsize
    for start in range(0, len(tokens) - width, width):
        digest = _digest(digest, tokens[start : start + width])
        yield digest


def _digest(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(parent + tokens, digest_size=32).digest()


class BlockPool:
    """Hands out block ids ``0 .. num_blocks``, several times where requests share a block.

    A block that nobody reads any more is free, and keeps its contents until it is needed for
    others: the one that was given back first goes first, and of one request the last. Blocks
    without reusable contents go before all of them.

    A run of blocks comes out in ascending order where it can: stages read blocks that lie side by
    side without copying them.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.num_blocks = num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # taken from the end
        self._kept: OrderedDict[int, None] = OrderedDict()  # free with contents, oldest first
        self._num_readers = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody reads."""
        return len(self._blank) + len(self._kept)

    def holds(self, digest: bytes) -> bool:
        """Whether a block with this digest can be found; one look, so that any thread may ask."""
        return digest in self._by_digest

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a prompt, given by its digests."""
        block_ids = []
        for digest in digests:
            block_id = self._by_digest.get(digest)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def can_allocate(self, count: int, shared: Sequence[int] = ()) -> bool:
        """Whether so many blocks are free beside those of `shared` that are."""
        num_free = len(self._blank) + len(self._kept)
        return count + sum(block_id in self._kept for block_id in shared) <= num_free

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int]:
        """One more reader for the blocks `shared`, and `count` blocks to write into after them.

        Raises:
            ValueError: `can_allocate` denies it.
        """
        if count < 0 or not self.can_allocate(count, shared):
            raise ValueError(f"{count} blocks of {self.num_free} free ones")
        for block_id in shared:
            self._kept.pop(block_id, None)
            self._num_readers[block_id] += 1
        first_kept = max(len(self._blank) - count, 0)
        block_ids = self._blank[first_kept:][::-1]
        del self._blank[first_kept:]
        if len(block_ids) < count:
            block_ids = sorted(block_ids + self._evict(count - len(block_ids)))
        for block_id in block_ids:
            self._num_readers[block_id] = 1
        return [*shared, *block_ids]

    def publish(self, block_id: int, digest: bytes) -> None:
        """Let others share a block that is full; where another holds the same, that one stays."""
        if self._digests[block_id] is None and digest not in self._by_digest:
            self._digests[block_id] = digest
            self._by_digest[digest] = block_id

    def forget(self, block_ids: Iterable[int]) -> None:
        """Share these blocks with nobody any more: what they hold is of no use."""
        for block_id in block_ids:
            digest = self._digests[block_id]
            if digest is not None:
                del self._by_digest[digest]
                self._digests[block_id] = None
                if block_id in self._kept:
                    del self._kept[block_id]
                    self._blank.append(block_id)

    def free(self, block_ids: Sequence[int]) -> None:
        """End the reading of a request's blocks; ValueError when nobody reads one of them."""
        for block_id in reversed(block_ids):
            if self._num_readers[block_id] == 0:
                raise ValueError(f"block {block_id} is free already")
            self._num_readers[block_id] -= 1
            if self._num_readers[block_id]:
                continue
            if self._digests[block_id] is None:
                self._blank.append(block_id)
            else:
                self._kept[block_id] = None

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that `held`, with repetitions, are the readers of all blocks. For tests: slow."""
        num_readers = [0] * self.num_blocks
        for block_id in held:
            num_readers[block_id] += 1
        assert num_readers == self._num_readers, "a block has lost a reader, or has one too many"
        free = [*self._blank, *self._kept]
        unread = [block_id for block_id, count in enumerate(num_readers) if count == 0]
        assert sorted(free) == unread, "a block is lost"
        assert all(self._digests[block_id] is None for block_id in self._blank)
        known = {digest: id for id, digest in enumerate(self._digests) if digest is not None}
        assert known == self._by_digest
        assert all(self._digests[block_id] is not None for block_id in self._kept)

    def _evict(self, count: int) -> list[int]:
        """Take free blocks and forget what they hold."""
        block_ids = []
        for _ in range(count):
            block_id, _ = self._kept.popitem(last=False)
            digest = self._digests[block_id]
            assert digest is not None
            del self._by_digest[digest]
            self._digests[block_id] = None
            block_ids.append(block_id)
        return block_ids
