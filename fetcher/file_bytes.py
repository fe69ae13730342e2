"""Bytes of a file, all that were asked for or an error."""

import os
from pathlib import Path

from ..errors import ReleaseError

_MAX_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB less a page at once


def read_exactly(path: Path, offset: int, buffer: memoryview) -> None:
    """Fills the buffer from a file; blocks on the disk.

    Raises:
        ReleaseError: it cannot be read, or ends before.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as cause:
        raise ReleaseError(f"Cannot open {path}: {cause.strerror}; verify the release.") from cause
    try:
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _MAX_READ_BYTES]
            num_read = os.preadv(descriptor, [part], offset + done)
            if num_read == 0:
                raise ReleaseError(f"{path} ends at byte {offset + done}; verify the release.")
            done += num_read
    except OSError as cause:
        raise ReleaseError(f"Cannot read {path}: {cause.strerror}; check the disk.") from cause
    finally:
        os.close(descriptor)
