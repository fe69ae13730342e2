"""Tensors of a release that is still being downloaded: reading waits until they are there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..piece_map import ByteRange, ranges_of
from ..tensors import TensorEntry, TensorIndex
from .source import FileTensorSource

if TYPE_CHECKING:
    import torch


class Arrivals(Protocol):
    """Whoever knows which bytes of the release are verified and in its files."""

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        """Returns once these bytes may be read.

        Raises:
            MagnetarError: they will not come; InterruptedByUserError: nobody waits any more.
        """
        ...


class ArrivingTensorSource:
    """A `TensorSource` that waits for one step of a plan after the other, and reads nothing else.

    Within a step tensors are read in any order. One thread.
    """

    def __init__(
        self,
        folder: Path,
        index: TensorIndex,
        steps: Iterable[Sequence[TensorEntry]],
        arrivals: Arrivals,
    ) -> None:
        """`steps` are what will be read, in the order in which it is brought."""
        self._files = FileTensorSource(folder, index, verified=())
        self._arrivals = arrivals
        self._step_of = {entry.name: tuple(step) for step in steps for entry in step}

    @property
    def index(self) -> TensorIndex:
        """What there is, of other stages too."""
        return self._files.index

    def read(self, name: str) -> torch.Tensor:
        """See `FileTensorSource.read`; blocks until the tensor's step has arrived.

        Raises:
            CheckpointError: also for a tensor that is in no step. What `Arrivals.wait` raises.
        """
        if step := self._step_of.get(name, ()):
            ranges = ranges_of(step)
            self._arrivals.wait(ranges)
            self._files.allow(ranges)
            for entry in step:
                del self._step_of[entry.name]
        return self._files.read(name)
