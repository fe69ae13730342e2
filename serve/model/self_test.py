"""Whether a fast way to compute something agrees with the plain one, before it is trusted."""

import torch


def check_agrees(
    found: torch.Tensor, wanted: torch.Tensor, *, rtol: float = 0.016, atol: float = 1e-5
) -> None:
    """Hold every number to within ``atol + rtol * |wanted|``.

    Unlike `torch.testing`, whose first comparison imports torch's distributed tensors: 0.8 s in
    every process with a stage.

    Raises:
        ArithmeticError: another shape or dtype, a number too far off, or none at all.
    """
    if found.shape != wanted.shape or found.dtype is not wanted.dtype:
        raise ArithmeticError(
            f"{list(found.shape)} of {found.dtype}, not {list(wanted.shape)} of {wanted.dtype}"
        )
    found, wanted = found.double(), wanted.double()
    if not torch.allclose(found, wanted, rtol=rtol, atol=atol):
        raise ArithmeticError(f"numbers differ by up to {(found - wanted).abs().max():.3g}")
