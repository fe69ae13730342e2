"""How fast bytes may cross the network, and how people write it."""

import re
from dataclasses import dataclass

from ..errors import UsageError

_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?) ?([kKMG]?)(i?)B?(?:/s)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class RateLimits:
    """Of one node, for what goes to the outside or comes from there; not on its own network.

    What was not used in the last three seconds may be made up for at once.
    """

    download_bytes_per_s: int = 0
    """0: none."""
    upload_bytes_per_s: int | None = None
    """0: none; None: the usual one."""


def parse_rate(text: str) -> int:
    """Bytes a second of ``500kB``, ``5M``, ``2.5MiB`` or ``0``, which is no limit.

    Without an ``i`` a k is 1000.

    Raises:
        UsageError: it has another form, or rounds to nothing.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise UsageError(f"{text!r} is no rate: write 500kB or 5MB a second, or 0 for no limit")
    base = 1024 if match[3] else 1000
    amount = float(match[1])
    rate = int(amount * base ** ("", "K", "M", "G").index(match[2].upper()))
    if amount and not rate:
        raise UsageError(f"{text!r} lets nothing through: raise it, or write 0 for no limit")
    return rate
