"""Did-you-mean: the known word that is nearest to what was typed."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no known word is near."""
    # A whole magnet link is compared by its beginning: difflib is quadratic.
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:64].lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
