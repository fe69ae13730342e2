"""The gated feed-forward network: the dense layer, and what every expert of a sparse one is.

Shapes: T tokens, C model width, I hidden width (`hidden_dim`), F = 2 * I.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .linear import Linear, trusted_rows


def gated(
    h_TF: torch.Tensor, silu: Callable[[torch.Tensor], torch.Tensor] = F.silu
) -> torch.Tensor:
    """``silu(w1 x) * (w3 x)`` [T, I] of the two products side by side."""
    width = h_TF.shape[-1] // 2
    if h_TF.dtype is torch.bfloat16 and h_TF.device.type == "cpu" and width % 16 == 0:
        rows = trusted_rows()
        if rows is not None:
            h_TF = h_TF.contiguous()
            y_TI = h_TF.new_empty(len(h_TF), width)
            rows.gated(h_TF.data_ptr(), y_TI.data_ptr(), len(h_TF), width, torch.get_num_threads())
            return y_TI
    gate_TI, up_TI = h_TF.chunk(2, dim=-1)
    return silu(gate_TI).mul_(up_TI)


class FeedForward:
    """``w2(silu(w1 x) * w3 x)``, with `w1` above `w3` for one product instead of two."""

    __slots__ = ("_silu", "w2", "w13")

    def __init__(
        self,
        *,
        w13: Linear,
        w2: Linear,
        silu: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    ) -> None:
        self.w13 = w13
        """C -> 2 * I"""
        self.w2 = w2
        """I -> C"""
        self._silu = silu

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C]"""
        return self.w2(gated(self.w13(x_TC), self._silu))
