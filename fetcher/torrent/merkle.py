"""Hash trees of version 2 torrents (BEP 52): SHA-256 over 16 KiB blocks, a tree for each file."""

import hashlib
from collections.abc import Sequence

BLOCK_BYTES = 16_384
NO_BLOCK = bytes(32)
"""Stands in the lowest layer for blocks beyond the end of a file."""


def piece_hash(piece: bytes, *, num_blocks: int) -> bytes:
    """The hash of one piece, as if it had `num_blocks` blocks, a power of two."""
    view = memoryview(piece)
    blocks = [
        hashlib.sha256(view[at : at + BLOCK_BYTES]).digest()
        for at in range(0, len(piece), BLOCK_BYTES)
    ]
    return _root(blocks, width=num_blocks, filler=NO_BLOCK)


def file_root(pieces: Sequence[bytes], *, blocks_per_piece: int) -> bytes:
    """The root of a file of more than one piece, from the hashes of all of them."""
    filler = _root([], width=blocks_per_piece, filler=NO_BLOCK)
    return _root(pieces, width=next_power_of_two(len(pieces)), filler=filler)


def next_power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def _root(layer: Sequence[bytes], *, width: int, filler: bytes) -> bytes:
    while width > 1:
        # Odd layers end with the root of an empty subtree, without making all of its leaves.
        padded = [*layer, filler] if len(layer) % 2 else list(layer)
        layer = [
            hashlib.sha256(left + right).digest()
            for left, right in zip(padded[::2], padded[1::2], strict=True)
        ]
        filler = hashlib.sha256(filler + filler).digest()
        width //= 2
    return layer[0] if layer else filler
