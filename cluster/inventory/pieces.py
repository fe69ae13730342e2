"""Short pieces of work, timed, and which of them nothing else on the machine disturbed.

A processor that others want is shared in turns of some milliseconds. So what is measured is cut
into pieces shorter than these, a few after every pause, for who has slept is served first. Pieces
in which our threads hardly waited for a processor count. On two cores with five to seven other
processes weights were read at 57 to 62 GB/s by these, and at 15 to 50 by the median of all pieces.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from .own_threads import Waits, apart, busiest, computed_ns

SLICE_S: Final = 0.2
"""How long each figure is measured for, if enough pieces of that time were undisturbed."""
LONGEST_S: Final = 0.4
"""How long otherwise."""
ENOUGH: Final = 12
FEWEST: Final = 3
"""Pieces of each figure, however long they take; also those that must be undisturbed."""
DISTURBED: Final = 0.03
"""Waiting, as a share of a piece: all that threads need to wake is less."""


class Piece(NamedTuple):
    """One of them."""

    seconds: float
    waited_s: float = 0.0
    """For processors, all threads of this process together."""

    @property
    def waited_share(self) -> float:
        """Of its time; more than 1 where several threads waited."""
        return self.waited_s / self.seconds if self.seconds > 0 else 0.0


def timed_pieces(
    work: Callable[[], object],
    *,
    pause_s: float,
    warm: int = 0,
    counted: int = 1,
    num_threads: int = 0,
    less_s: Callable[[], float] | None = None,
    slice_s: float = SLICE_S,
) -> list[Piece]:
    """Do `work` again and again, and time it: after every pause `counted` pieces, `warm` before.

    The first round counts for nothing: it wakes threads or makes them. So many of them as compute,
    `num_threads`, then stay on processors of their own. `less_s` says how much of the piece that is
    just over does not count. Takes `slice_s` if that brings enough pieces that were undisturbed,
    and `LONGEST_S` at most, beside `FEWEST` pieces.
    """
    found: list[Piece] = []
    before = computed_ns()
    time.sleep(pause_s)
    for _ in range(warm + counted):
        work()
    with Waits() as waits, apart(busiest(before, num_threads)):
        began = time.perf_counter()
        while len(found) < FEWEST or _goes_on(found, time.perf_counter() - began, slice_s):
            time.sleep(pause_s)
            for _ in range(warm):
                work()
            for _ in range(counted):
                waited_s, piece_began = waits.total_s(), time.perf_counter()
                work()
                seconds = time.perf_counter() - piece_began
                waited_s = waits.total_s() - waited_s
                found.append(Piece(seconds - (less_s() if less_s else 0.0), waited_s))
    return found


def _goes_on(found: Sequence[Piece], passed_s: float, slice_s: float) -> bool:
    num_calm = sum(piece.waited_share <= DISTURBED for piece in found)
    return passed_s < (slice_s if num_calm >= ENOUGH else LONGEST_S)


def undisturbed_s(pieces: Sequence[Piece]) -> float:
    """The lower quartile of those in which threads hardly waited; where there are too few, of the
    quarter that waited least."""
    calm = [piece.seconds for piece in pieces if piece.waited_share <= DISTURBED]
    if len(calm) >= FEWEST:
        return lower_quartile(calm)
    by_wait = sorted(pieces, key=lambda piece: piece.waited_share)
    return lower_quartile([piece.seconds for piece in by_wait[: -(-len(pieces) // 4)]])


def lower_quartile(seconds: Sequence[float]) -> float:
    """What a quarter of them is not above: of hand-overs many are late, for whatever reason."""
    if len(seconds) == 1:
        return seconds[0]
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]
