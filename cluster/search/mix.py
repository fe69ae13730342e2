"""Steps with prompts and steps without: the mix in which many streams are decoded.

A step has a size. It decodes its sequences, and what is left of its size goes to prompts; both
share one read of the weights. So some steps are full, and the others have what they decode alone.
How often one is full follows from its size: prompts come evenly with what is generated.

Where reading takes longest, prompts that are small enough cost nothing, and small steps keep the
others from waiting. Where steps need few experts, a large one reads fewer for its prompts. So
there are two sizes, and which of them is better is for the plan to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from ..footprint import STEP_TOKENS
from .expert_cost import Array

PROMPT_TOKENS = 1.0
"""Of prompts for every token that is generated, where many streams are planned for. They travel in
chunks through the same stages and over the same links; conversations have up to three."""
_ROOM = 4
"""Times the decoded sequences that a small step has room for: as many tokens of prompts can come
with each of them as conversations have."""
_LEAST = 16
"""Tokens of a small step at least: below, a single prompt takes too many of them."""

Mix = tuple[tuple[float, int], ...]
"""Shares of all steps, each with how many tokens its steps have."""


def sizes(tokens: int) -> tuple[int, ...]:
    """Of steps that decode `tokens` sequences: large, and small if that is less."""
    small = max(_LEAST, 1 << (_ROOM * tokens - 1).bit_length())
    return (STEP_TOKENS, small) if small < STEP_TOKENS else (STEP_TOKENS,)


def mix(tokens: int, size: int) -> Mix:
    """Of steps that decode `tokens` sequences and have up to `size` tokens. Where not even full
    steps all the time bring the prompts, there are more of them than one for each that decodes."""
    full = PROMPT_TOKENS * tokens / max(size - tokens, size // _ROOM)
    return (max(0.0, 1 - full), tokens), (full, size)


@overload
def mean(mixes: Sequence[Mix], cost: Callable[[int], float]) -> float: ...
@overload
def mean(mixes: Sequence[Mix], cost: Callable[[int], Array]) -> Array: ...
def mean(mixes: Sequence[Mix], cost: Callable[[int], Any]) -> Any:
    """Of what a step of so many tokens costs, in the mix where that is least; arrays by element."""
    known = {tokens: cost(tokens) for each in mixes for share, tokens in each if share}
    found = [sum(share * known[tokens] for share, tokens in each if share) for each in mixes]
    least = found[0] if len(found) == 1 else np.minimum(*found)
    return least if np.ndim(least) else float(least)
