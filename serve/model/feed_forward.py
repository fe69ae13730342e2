"""The gated feed-forward network, dense.

Shapes: T tokens, C model width, I hidden width (`hidden_dim`), F = 2 * I.
"""

import torch
import torch.nn.functional as F


def gated(h_TF: torch.Tensor) -> torch.Tensor:
    """``silu(w1 x) * (w3 x)`` [T, I] of the two products side by side."""
    gate_TI, up_TI = h_TF.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


def swiglu(x_TC: torch.Tensor, w13_FC: torch.Tensor, w2_CI: torch.Tensor) -> torch.Tensor:
    """``w2(silu(w1 x) * w3 x)`` [T, C]."""
    return F.linear(gated(F.linear(x_TC, w13_FC)), w2_CI)


class FeedForward:
    """The dense network: `w1` above `w3` in one matrix, for one GEMM instead of two."""

    def __init__(self, *, w13: torch.Tensor, w2: torch.Tensor) -> None:
        self.w13 = w13
        """[2 * I, C]"""
        self.w2 = w2
        """[C, I]"""

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C]"""
        return swiglu(x_TC, self.w13, self.w2)
