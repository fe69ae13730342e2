"""Matrices made ready to multiply."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch

from magnetar.serve.model import compiled, linear, rows
from magnetar.serve.model.compiled import NoCompiledKernelsError, compiled_rows
from magnetar.serve.model.linear import (
    LINEAR_KERNELS,
    default_linear_kernel,
    packed_linear,
    plain_linear,
)
from magnetar.serve.model.quantise import Int4Matrix, Int8Matrix, quantise_int4, quantise_int8

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
def test_packed_agrees_with_plain(dtype: torch.dtype, num_tokens: int) -> None:
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


ROUNDED: Mapping[str, Callable[[torch.Tensor], Int8Matrix | Int4Matrix]] = {
    "int8": quantise_int8,
    "int4": quantise_int4,
}


def has_rows() -> bool:
    try:
        compiled_rows()
    except NoCompiledKernelsError:
        return False
    return True


needs_rows = pytest.mark.skipif(not has_rows(), reason="no compiler or no AVX512-BF16")


def random_product(num_tokens: int, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(num_outputs, 96, generator=generator).bfloat16()
    return weight, torch.randn(num_tokens, 96, generator=generator).bfloat16()


@needs_rows
@pytest.mark.parametrize("form", ["", "-int8", "-int4"])
@pytest.mark.parametrize("num_outputs", [32, 40])
def test_compiled_agrees_with_exact_arithmetic(form: str, num_outputs: int) -> None:
    for num_tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 21):
        weight, x = random_product(num_tokens, num_outputs)
        exact = weight.double()
        if form == "-int8":
            eight = quantise_int8(weight)
            scales = eight.scales_NG.double().repeat_interleave(32, dim=1)
            exact = eight.q_NK.double() * scales
        if form == "-int4":
            four = quantise_int4(weight)
            scales, zeros = (
                numbers.double().repeat_interleave(32, dim=1)
                for numbers in (four.scales_NG, four.zeros_NG)
            )
            exact = (four.levels().double() - 8) * scales + zeros
        y = LINEAR_KERNELS[f"rows{form}"](weight)(x)
        torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1 / 128, atol=1e-3)


@needs_rows
@pytest.mark.parametrize("form", ["", "-int8", "-int4"])
def test_compiled_rows_come_out_the_same_whatever_is_beside_them(form: str) -> None:
    weight, x = random_product(21, 40)
    multiply = LINEAR_KERNELS[f"rows{form}"](weight)
    alone = torch.cat([multiply(row) for row in torch.split(x, 1)])
    assert torch.equal(multiply(x), alone)


@needs_rows
def test_compiled_results_do_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 512, generator=generator).bfloat16()
    x = torch.randn(3, 512, generator=generator).bfloat16()
    multiply = LINEAR_KERNELS["rows"](weight)
    alone = multiply(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(multiply(x), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_rounded_kernels_of_torch_agree_with_the_rounded_matrix(
    name: str, weights: Literal["int8", "int4"]
) -> None:
    if f"{name}-{weights}" not in LINEAR_KERNELS:
        return
    for num_outputs in (32, 40):
        weight, x = random_product(3, num_outputs)
        expected = x @ ROUNDED[weights](weight).dequantise().T
        y = LINEAR_KERNELS[f"{name}-{weights}"](weight)(x)
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.1)


def test_without_a_compiler_torch_does_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_processor", lambda: set(compiled._NEEDED))
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(rows, "compiled_rows", compiled_rows.__wrapped__)
    choose = default_linear_kernel.__wrapped__
    with caplog.at_level(logging.INFO):
        assert choose(dtype=torch.bfloat16, device=CPU) == "packed"
        assert choose(dtype=torch.bfloat16, device=CPU, weights="int4") == "packed-int4"
        assert choose(dtype=torch.bfloat16, device=CPU, weights="int8") == "plain-int8"
    assert "there is no C compiler" in caplog.text
    assert "no fast kernel for int8" in caplog.text


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'rows.c: no such dialect' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_processor", lambda: set(compiled._NEEDED))
    with pytest.raises(NoCompiledKernelsError, match="no such dialect"):
        compiled_rows.__wrapped__()


def test_another_processor_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_processor", lambda: {"avx2"})
    with pytest.raises(NoCompiledKernelsError, match="avx512_bf16"):
        compiled_rows.__wrapped__()


@needs_rows
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_compiled_rounds_as_torch_does(weights: Literal["int8", "int4"]) -> None:
    weight, _ = random_product(1, 40)
    weight[3, :32] = 0.25  # a group of one value
    weight[4] = 0
    seen = LINEAR_KERNELS[f"rows-{weights}"](weight)(torch.eye(96).bfloat16()).T
    torch.testing.assert_close(seen, ROUNDED[weights](weight).dequantise(), rtol=2**-7, atol=0)
