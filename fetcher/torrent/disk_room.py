"""When a download waits for room on its disk. Pure: readings in, decision out."""

from typing import Final

RESERVE_BYTES: Final = 512 << 20
"""Left free for whatever else lives on the disk; far more than libtorrent's write queue."""
RETRY_S: Final = 5.0
MAX_RETRY_S: Final = 300.0


class DiskRoom:
    """Short of room or not, with a margin between the two, so that it does not flutter."""

    def __init__(self) -> None:
        self.is_short = False
        """Nothing may be downloaded now."""
        self.has_failed = False
        """A write failed since `look` last said that there is room again."""
        self._retry_s = RETRY_S
        self._not_before_s = 0.0

    def ran_full(self, now_s: float) -> None:
        """A write failed for want of room, whatever the disk says is free (quotas, for example).

        Each time in a row it takes longer until the next try.
        """
        if not self.has_failed:
            self._not_before_s = now_s + self._retry_s
            self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
        self.is_short = self.has_failed = True

    def look(self, free_bytes: int, missing_bytes: int, now_s: float) -> bool:
        """Whether the download must wait, with so much free and so much still to come.

        The last of a download may use the reserve: a disk that holds it to the last byte is enough.
        """
        if not self.is_short:
            self.is_short = free_bytes < RESERVE_BYTES < missing_bytes
        elif self.has_failed:
            enough = free_bytes >= min(RESERVE_BYTES, max(1, missing_bytes))
            self.is_short = self.has_failed = not enough or now_s < self._not_before_s
        else:
            self.is_short = free_bytes < min(2 * RESERVE_BYTES, missing_bytes)
        return self.is_short
