"""Rotary position embedding on interleaved pairs, the order of Mistral's own checkpoints.

Shapes: T tokens of the step, N heads (of queries, or queries and keys side by side),
D head dimension, P = D / 2 pairs.
"""

import torch

_FEWEST = 1024


def rotations(positions_T: torch.Tensor, *, head_dim: int, theta: float) -> torch.Tensor:
    """The unit complex number [T, 1, P] by which every pair of every token turns.

    Angles are in fp32, as in the reference implementations that trained the models.
    """
    device = positions_T.device
    exponents_P = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles_TP = torch.outer(positions_T.float(), 1.0 / theta**exponents_P)
    return torch.polar(torch.ones_like(angles_TP), angles_TP).unsqueeze(1)


class Rotations:
    """The turns of all positions from 0 to the highest that was asked for, or up to twice as many.

    Computing those of a step takes it dozens of small calls, which matters where all that a stage
    computes of a token is a fraction of a millisecond.
    """

    def __init__(self, *, head_dim: int, theta: float, device: torch.device) -> None:
        self._head_dim = head_dim
        self._theta = theta
        self._device = device
        self._turns_L1P = self._made(0)

    def until(self, end: int) -> torch.Tensor:
        """Those of the positions 0 .. L, L at least `end`: [L, 1, P] complex numbers."""
        if end > len(self._turns_L1P):
            self._turns_L1P = self._made(max(_FEWEST, 1 << (end - 1).bit_length()))
        return self._turns_L1P

    def _made(self, count: int) -> torch.Tensor:
        positions_L = torch.arange(count, device=self._device)
        return rotations(positions_L, head_dim=self._head_dim, theta=self._theta)


def rotate(x_TND: torch.Tensor, rotations_T1P: torch.Tensor) -> torch.Tensor:
    """Pairs (0, 1), (2, 3), ... of every head, turned in fp32; returns the dtype of `x_TND`."""
    pairs_TNP = torch.view_as_complex(x_TND.float().view(*x_TND.shape[:-1], -1, 2))
    return torch.view_as_real(pairs_TNP * rotations_T1P).flatten(-2).to(x_TND.dtype)
