"""Every error that Magnetar raises on purpose, and the exit code of the command that meets it.

MagnetarError                    1  something failed
├── UsageError                   2  what was asked for makes no sense
│   ├── MagnetError              2  a magnet link that cannot be repaired
│   ├── ManifestError            2  a manifest with errors, all of them at once
│   └── InventoryError           2  machines or links with numbers that cannot be
├── NotFoundError                4  a file, release, deployment or address that is not there
├── TimedOutError                6  nothing came within the time that was given
├── PreflightError               7  it cannot work on this machine; nothing was changed
│   ├── DiskSpaceError           7  the disk is too small for the download
│   ├── PortInUseError           7  somebody listens there already
│   └── InfeasiblePlanError      7  no placement fits the memory there is
├── ReleaseError                 1  a release whose files are missing, surplus or disagree
│   ├── CheckpointError          1  a weights file that is malformed
│   │   └── UnsafePickleError    1  a pickle that asks for more than tensors
│   └── TokenizerError           1  a tokenizer that does not fit the model
├── DownloadError                1  the swarm or the disk failed
│   └── DiskFullError            1  the disk has no room for what arrives
├── VerifyError                  1  bytes that do not have the published hash
├── StageLostError               1  a stage or its link died
├── QueueFullError               1  too many requests wait already
├── NotFiniteError               1  the numbers of one request overflowed
└── InterruptedByUserError     130  Ctrl-C or SIGTERM

A message says what happened, with the value, and then what to do next.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class MagnetarError(Exception):
    """Something failed; the message says what and what to do."""

    exit_code = 1

    def fields(self) -> dict[str, Any]:
        """What programs are told besides the message; arguments of the class, by name."""
        return {}


class UsageError(MagnetarError):
    """What was asked for makes no sense."""

    exit_code = 2


class MagnetError(UsageError):
    """A magnet link that cannot be repaired."""


class ManifestError(UsageError):
    """A manifest with errors; the message lists all of them with file:line:column."""


class InventoryError(UsageError):
    """Machines or links with numbers that cannot be; the message lists them with their places."""


class NotFoundError(MagnetarError):
    """A file, release, deployment or address that is not there."""

    exit_code = 4


class TimedOutError(MagnetarError):
    """Nothing came within the time that was given."""

    exit_code = 6


class PreflightError(MagnetarError):
    """It cannot work on this machine; nothing was changed."""

    exit_code = 7


class DiskSpaceError(PreflightError):
    """The disk is too small for the download."""


class PortInUseError(PreflightError):
    """Somebody listens on the port already."""


class InfeasiblePlanError(PreflightError):
    """No placement fits the memory there is; the message has the numbers."""

    def __init__(self, message: str, *, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """`changes` each suffice by themselves, the cheapest first: their knob, amount and text."""
        super().__init__(message)
        self.changes = tuple(changes)

    def fields(self) -> dict[str, Any]:
        """See `MagnetarError.fields`."""
        return {"changes": self.changes} if self.changes else {}


class ReleaseError(MagnetarError):
    """A release whose files are missing, surplus or disagree with each other."""


class CheckpointError(ReleaseError):
    """A weights file that is malformed."""


class UnsafePickleError(CheckpointError):
    """A pickle that asks for more than tensors; nothing of it was executed."""


class TokenizerError(ReleaseError):
    """A tokenizer that does not fit the model."""


class DownloadError(MagnetarError):
    """The swarm or the disk failed; what was downloaded is kept."""


class DiskFullError(DownloadError):
    """The disk has no room for what arrives; what arrived is kept."""


class VerifyError(MagnetarError):
    """Bytes that do not have the published hash."""


class StageLostError(MagnetarError):
    """A stage or its link died."""


class QueueFullError(MagnetarError):
    """Too many requests wait already; the same request may be sent again later."""


class NotFiniteError(MagnetarError):
    """The numbers of one request overflowed; other requests are not concerned."""


class InterruptedByUserError(MagnetarError):
    """Ctrl-C or SIGTERM; the message says how to resume."""

    exit_code = 130
