"""Read, check and turn the tensors that come next while the last ones are being packed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..tensors import TensorEntry, TensorIndex, TensorSource

if TYPE_CHECKING:
    import torch

MAX_THREADS: Final = 4
MAX_AHEAD_BYTES: Final = 256 << 20
"""Of tensors that nobody has asked for yet, one at least."""


class ReadAhead:
    """A `TensorSource` over another one, which must bear several threads.

    Hashing is what reading costs where the disk is fast: 1.3 GB/s in one thread. Tensors are taken
    in about the order in which they will be asked for; any other order works, without the gain.
    For one reader.
    """

    def __init__(
        self,
        source: TensorSource,
        order: Iterable[TensorEntry],
        *,
        max_ahead_bytes: int = MAX_AHEAD_BYTES,
    ) -> None:
        self._source = source
        self._coming = deque(order)
        self._max_ahead_bytes = max_ahead_bytes
        self._ahead_bytes = 0
        self._ahead: dict[str, tuple[int, Future[torch.Tensor]]] = {}
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads, "read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not waited for: one of them may wait for bytes that never arrive.
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def index(self) -> TensorIndex:
        """What there is, of other stages too."""
        return self._source.index

    def read(self, name: str) -> torch.Tensor:
        """As the source's; raises what that raised."""
        self._send_ahead()
        if name not in self._ahead:
            self._coming = deque(entry for entry in self._coming if entry.name != name)
            return self._source.read(name)
        num_bytes, reading = self._ahead.pop(name)
        try:
            return reading.result()
        finally:
            self._ahead_bytes -= num_bytes
            self._send_ahead()

    def _send_ahead(self) -> None:
        while self._coming and (
            not self._ahead
            or self._ahead_bytes + self._coming[0].num_bytes <= self._max_ahead_bytes
        ):
            entry = self._coming.popleft()
            self._ahead_bytes += entry.num_bytes
            reading = self._threads.submit(self._source.read, entry.name)
            self._ahead[entry.name] = (entry.num_bytes, reading)
