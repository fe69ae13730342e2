"""A tensor as a weights file names it, before anybody knows what it is for."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..tensors import DTYPE_BYTES, StoredDtype


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A contiguous, row-major byte range of one file."""

    name: str
    """As the file has it."""
    file: str
    offset: int
    """First byte inside the file."""
    dtype: StoredDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Length of the byte range."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def some(names: Iterable[str], *, limit: int = 3) -> str:
    """A few of the names, for a message: ``a, b, c and 9 more``; control characters escaped."""
    ordered = list(names)
    shown = ", ".join(repr(name[:200])[1:-1] for name in ordered[:limit])
    rest = len(ordered) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
