"""Rotary position embedding on interleaved pairs, the order of Mistral's own checkpoints.

Shapes: T tokens of the step, N heads (of queries, or queries and keys side by side),
D head dimension, P = D / 2 pairs.
"""

import torch


def rotations(positions_T: torch.Tensor, *, head_dim: int, theta: float) -> torch.Tensor:
    """The unit complex number [T, 1, P] by which every pair of every token turns.

    Computed from the positions once per step and shared by all layers, so that there is no table
    to size. Angles are in fp32, as in the reference implementations that trained the models.
    """
    device = positions_T.device
    exponents_P = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles_TP = torch.outer(positions_T.float(), 1.0 / theta**exponents_P)
    return torch.polar(torch.ones_like(angles_TP), angles_TP).unsqueeze(1)


def rotate(x_TND: torch.Tensor, rotations_T1P: torch.Tensor) -> torch.Tensor:
    """Pairs (0, 1), (2, 3), ... of every head, turned in fp32; returns the dtype of `x_TND`."""
    pairs_TNP = torch.view_as_complex(x_TND.float().view(*x_TND.shape[:-1], -1, 2))
    return torch.view_as_real(pairs_TNP * rotations_T1P).flatten(-2).to(x_TND.dtype)
