"""Did-you-mean: the known word that is nearest to what was typed."""

import difflib
from collections.abc import Iterable

_MOST = 3
"""Of words that go on where what was typed ends."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no known word is near."""
    # A whole magnet link is compared by its beginning: difflib is quadratic.
    start = word[:64].lower()
    by_lower = {name.lower(): name for name in known}
    longer = [name for name in by_lower if name.startswith(start)] if len(start) > 1 else []
    longer = [name for name in longer if not any(name.startswith(f"{other}-") for other in longer)]
    near = sorted(longer)[:_MOST] or difflib.get_close_matches(start, by_lower, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(by_lower[name]) for name in near)}?" if near else ""
