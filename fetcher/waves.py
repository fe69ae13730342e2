"""In which order pieces are brought: wave after wave, so that what is needed first is whole first.

libtorrent knows seven priorities, and picks a piece of a higher one before all of a lower one.
Deadlines would be worse than no order at all: they ask several peers for the same blocks (34 MB of
256 came twice, and nothing was ready before the end). Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Final, Self

from .piece_map import ByteRange, PieceMap

HIGHEST: Final = 7
LOWEST: Final = 1


@dataclass(frozen=True, slots=True)
class Waves:
    """Disjoint sets of pieces; a piece in none of them is not brought at all."""

    waves: tuple[frozenset[int], ...] = ()

    @classmethod
    def of(cls, *waves: Iterable[int]) -> Self:
        """A piece that several waves want belongs to the first of them; empty ones are gone."""
        seen: set[int] = set()
        found = []
        for wave in waves:
            if new := frozenset(wave) - seen:
                found.append(new)
                seen |= new
        return cls(tuple(found))

    @property
    def pieces(self) -> frozenset[int]:
        """All of them."""
        return frozenset().union(*self.waves)

    def within(self, pieces: frozenset[int]) -> "Waves":
        """Only these pieces, in the same order; those that no wave has come last."""
        return Waves.of(*(wave & pieces for wave in self.waves), pieces)

    def only(self, pieces: frozenset[int]) -> "Waves":
        """Those of these pieces that a wave has, in the same order."""
        return Waves.of(*(wave & pieces for wave in self.waves))

    def beside(self, other: "Waves") -> "Waves":
        """Each wave together with the one of the same number."""
        pairs = zip_longest(self.waves, other.waves, fillvalue=frozenset[int]())
        return Waves.of(*(one | another for one, another in pairs))

    def front(self, have: Sequence[bool]) -> int:
        """The first wave that lacks a piece; their number when none does."""
        for number, wave in enumerate(self.waves):
            if not all(have[piece] for piece in wave):
                return number
        return len(self.waves)

    def parts(self, have: Sequence[bool], num_parts: int) -> tuple[float, ...]:
        """How much is there of each of so many equal parts, 0 to 1, in the order of the waves."""
        order = [piece for wave in self.waves for piece in sorted(wave)]
        bounds = [len(order) * number // num_parts for number in range(num_parts + 1)]
        return tuple(
            sum(have[piece] for piece in order[first:end]) / (end - first) if end > first else 0.0
            for first, end in pairwise(bounds)
        )

    def priorities(self, front: int, num_pieces: int) -> list[int]:
        """One per piece: the highest for the waves up to `front`, then one less for each wave.

        Waves beyond the sixth share the lowest, until the front has moved on.
        """
        found = [0] * num_pieces
        for number, wave in enumerate(self.waves):
            level = min(HIGHEST, max(LOWEST, HIGHEST - (number - front)))
            for piece in wave:
                found[piece] = level
        return found


def waves_of(steps: Iterable[Iterable[ByteRange]], piece_map: PieceMap) -> Waves:
    """The pieces of each step of a plan, in its order.

    Raises:
        ReleaseError: the release has no such bytes.
    """
    return Waves.of(*(piece_map.pieces(step) for step in steps))
