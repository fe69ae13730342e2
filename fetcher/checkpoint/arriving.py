"""Tensors of a release that is still being downloaded: reading waits until they are there.

What was damaged on the disk since it arrived is fetched again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from ...errors import VerifyError
from ..piece_map import ByteRange, ranges_of
from ..tensors import TensorEntry, TensorIndex
from .checked_files import CheckedFiles, DamagedError, LoadChecks
from .source import FileTensorSource

if TYPE_CHECKING:
    import torch

MAX_REPAIRS: Final = 3

logger = logging.getLogger(__name__)


class Arrivals(Protocol):
    """Whoever brings the release to this node."""

    def wait(self, ranges: Sequence[ByteRange]) -> None:
        """Returns once these bytes are verified and in the files.

        Raises:
            MagnetarError: they will not come; InterruptedByUserError: nobody waits any more.
        """
        ...

    def mend(self, part: ByteRange) -> None:
        """Hashes the pieces of these bytes again, and fetches those anew that are not right.

        Raises:
            VerifyError: there is nowhere to fetch them from. What `wait` raises.
        """
        ...


class ArrivingTensorSource:
    """A `TensorSource` that waits for one step of a plan after the other, and reads nothing else.

    Within a step tensors are read in any order, from any thread.
    """

    def __init__(
        self,
        folder: Path,
        index: TensorIndex,
        steps: Iterable[Sequence[TensorEntry]],
        arrivals: Arrivals,
        *,
        checks: LoadChecks,
    ) -> None:
        """`steps` are what will be read, in the order in which it is brought."""
        self.checked = CheckedFiles(checks)
        self._files = FileTensorSource(folder, index, verified=(), files=self.checked)
        self._arrivals = arrivals
        self._asking = threading.Lock()
        self._step_of = {entry.name: tuple(step) for step in steps for entry in step}

    @property
    def index(self) -> TensorIndex:
        """What there is, of other stages too."""
        return self._files.index

    def read(self, name: str) -> torch.Tensor:
        """See `FileTensorSource.read`; blocks until the tensor's step has arrived.

        Raises:
            CheckpointError: also for a tensor that is in no step. VerifyError: it is damaged on
            the disk, and stays so. What `Arrivals` raises.
        """
        if name in self._step_of:
            self._await_step(name)
        for _ in range(MAX_REPAIRS):
            try:
                return self._files.read(name)
            except DamagedError as damage:
                logger.warning("%s: %s; its pieces are checked again", name, damage)
                with self._asking:
                    self._arrivals.mend(damage.part)
                    self.checked.mended(damage.part)
        raise VerifyError(
            f"{name} is damaged each time it is read: check the disk and the memory of this machine"
        )

    def _await_step(self, name: str) -> None:
        with self._asking:
            step = self._step_of.get(name, ())  # another thread may have awaited it meanwhile
            ranges = ranges_of(step)
            if step:
                self._arrivals.wait(ranges)
                self._files.allow(ranges)
            for entry in step:
                del self._step_of[entry.name]
