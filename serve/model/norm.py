"""Root-mean-square normalisation.

Shapes: T tokens of the step, C model width (`dim`).
"""

import torch
import torch.nn.functional as F

from .compiled import Rows
from .linear import trusted_rows


def rms_norm(x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    """Every token divided by its root mean square, times the weight, in the dtype of `x_TC`.

    Mean and product are taken in fp32 whatever the dtype and rounded once at the end; one fused
    call took 12 us where the same arithmetic in six calls took 20 us, and the compiled one 4.
    """
    if x_TC.dtype is torch.bfloat16 and x_TC.device.type == "cpu" and x_TC.shape[-1] % 16 == 0:
        rows = trusted_rows()
        if rows is not None:
            return _compiled(rows, x_TC.contiguous(), weight_C, eps)
    return F.rms_norm(x_TC, (x_TC.shape[-1],), weight_C, eps)


def _compiled(rows: Rows, x_TC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    y_TC = torch.empty_like(x_TC)
    num_tokens, width = x_TC.shape
    rows.rms_norm(
        x_TC.data_ptr(),
        weight_C.data_ptr(),
        y_TC.data_ptr(),
        num_tokens,
        width,
        eps,
        torch.get_num_threads(),
    )
    return y_TC
