"""Normalisation and gating, compiled and by torch."""

import pytest
import torch
import torch.nn.functional as F

from magnetar.serve.model import feed_forward, norm
from magnetar.serve.model.feed_forward import gated
from magnetar.serve.model.linear import trusted_rows
from magnetar.serve.model.norm import rms_norm

pytestmark = pytest.mark.skipif(trusted_rows() is None, reason="no compiler, AVX512-BF16 or VNNI")


def random_rows(num_rows: int, width: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return (torch.randn(num_rows, width, generator=generator) * scale).bfloat16()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_normalisation_is_exact_but_for_one_rounding(num_rows: int, scale: float) -> None:
    x, weight = random_rows(num_rows, 96, scale), random_rows(7, 96)[0]
    exact = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 40])
def test_gating_is_exact_but_for_one_rounding(num_rows: int, scale: float) -> None:
    h = random_rows(num_rows, 96, scale)
    gate, up = h.double().chunk(2, dim=-1)
    exact = F.silu(gate) * up
    torch.testing.assert_close(gated(h).double(), exact, rtol=2**-7.9, atol=1e-30)


def test_what_is_not_a_number_stays_so() -> None:
    h = random_rows(1, 32)
    h[0, 3] = float("nan")
    assert bool(gated(h)[0, 3].isnan())
    assert bool(rms_norm(h, torch.ones(32).bfloat16(), 1e-5).isnan().all())


def test_without_compiled_functions_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = random_rows(3, 96), random_rows(1, 96)[0]
    normed, gates = rms_norm(h, weight, 1e-5), gated(h)
    monkeypatch.setattr(norm, "trusted_rows", lambda: None)
    monkeypatch.setattr(feed_forward, "trusted_rows", lambda: None)
    torch.testing.assert_close(rms_norm(h, weight, 1e-5), normed)
    torch.testing.assert_close(gated(h), gates, rtol=0.02, atol=1e-3)
