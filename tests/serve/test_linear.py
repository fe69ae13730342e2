"""Matrices made ready to multiply."""

import logging

import pytest
import torch

from magnetar.serve.model import linear
from magnetar.serve.model.linear import (
    LINEAR_KERNELS,
    default_linear_kernel,
    packed_linear,
    plain_linear,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_packed_agrees_with_plain(dtype: torch.dtype, num_tokens: int) -> None:
    if default_linear_kernel(dtype=dtype, device=CPU) != "packed":
        pytest.skip("this build of torch has no packed matrices")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 72, generator=generator).to(dtype)
    x = torch.randn(num_tokens, 72, generator=generator).to(dtype)
    torch.testing.assert_close(packed_linear(weight)(x), plain_linear(weight)(x))


def test_other_devices_and_fp16_stay_plain() -> None:
    assert default_linear_kernel(dtype=torch.float16, device=CPU) == "plain"
    assert default_linear_kernel(dtype=torch.bfloat16, device=torch.device("cuda:0")) == "plain"


def test_a_kernel_that_fails_its_self_test_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(weight: torch.Tensor) -> linear.Linear:
        return plain_linear(weight * 2)

    monkeypatch.setattr(linear, "LINEAR_KERNELS", {**LINEAR_KERNELS, "packed": wrong})
    with caplog.at_level(logging.WARNING):
        assert default_linear_kernel.__wrapped__(dtype=torch.float32, device=CPU) == "plain"
    assert "packed matrices do not work here" in caplog.text


def test_the_default_is_a_known_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert default_linear_kernel(dtype=dtype, device=CPU) in LINEAR_KERNELS
