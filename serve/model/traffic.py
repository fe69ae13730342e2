"""How often each expert of a layer is chosen.

Shapes: T tokens, K experts per token, E experts.
"""

import threading
from collections import deque
from typing import Final

import torch

_MOST_PENDING: Final = 256


class ExpertTraffic:
    """Counts of one layer, which one thread adds to and any thread reads.

    Choices are only kept until somebody asks, or they are many: counting them one step at a time
    would take the layer 8 us, and on a GPU wait for it.
    """

    def __init__(self, num_experts: int) -> None:
        self.counts_E = torch.zeros(num_experts, dtype=torch.int64)
        """On the CPU; without those that are kept. Compiled layers, which keep none, add to it."""
        self._kept: deque[torch.Tensor] = deque()
        self._counting = threading.Lock()

    def add(self, experts_TK: torch.Tensor) -> None:
        """The choices of one step, which nobody must change afterwards."""
        self._kept.append(experts_TK)
        if len(self._kept) >= _MOST_PENDING:
            self._count()

    def totals(self) -> tuple[int, ...]:
        """Tokens that each expert was chosen for since the start."""
        self._count()
        return tuple(self.counts_E.tolist())

    def _count(self) -> None:
        with self._counting:
            kept = [self._kept.popleft() for _ in range(len(self._kept))]
            if kept:
                chosen = torch.cat([experts_TK.flatten() for experts_TK in kept])
                self.counts_E += chosen.bincount(minlength=len(self.counts_E)).cpu()
