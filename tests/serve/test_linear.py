"""Matrices made ready to multiply."""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.footprint import QUANT_GROUP
from magnetar.serve.model import compiled, linear, rows
from magnetar.serve.model.compiled import NoCompiledKernelsError, compiled_rows
from magnetar.serve.model.linear import (
    LINEAR_KERNELS,
    default_linear_kernel,
    packed_linear,
    plain_linear,
)
from magnetar.serve.model.quantise import (
    Int4Matrix,
    Int5Matrix,
    Int8Matrix,
    quantise_int4,
    quantise_int5,
    quantise_int8,
)

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


ROUNDED: Mapping[str, Callable[[torch.Tensor], Int8Matrix | Int5Matrix | Int4Matrix]] = {
    "int8": quantise_int8,
    "int5": quantise_int5,
    "int4": quantise_int4,
}


def has_rows() -> bool:
    try:
        compiled_rows()
    except NoCompiledKernelsError:
        return False
    return True


needs_rows = pytest.mark.skipif(not has_rows(), reason="no compiler, AVX512-BF16 or VNNI")


def random_product(num_tokens: int, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(num_outputs, 96, generator=generator).bfloat16()
    return weight, torch.randn(num_tokens, 96, generator=generator).bfloat16()


def exact_weight(weight: torch.Tensor, form: str) -> torch.Tensor:
    """What the matrix stands for, [N, K] in fp64 and not rounded again."""
    if form == "int8":
        eight = quantise_int8(weight)
        return eight.q_NK.double() * spread_out(eight.group_scales())
    if form == "int5":
        five = quantise_int5(weight)
        levels = five.q_NK.double() - 16
        return levels * spread_out(five.group_scales()) + spread_out(five.group_zeros())
    four = quantise_int4(weight)
    levels = four.levels().double() - 8
    return levels * spread_out(four.group_scales()) + spread_out(four.group_zeros())


def spread_out(groups: torch.Tensor) -> torch.Tensor:
    """One number a group, for each of its inputs."""
    return groups.double().repeat_interleave(QUANT_GROUP, dim=1)


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """Each group of 32 as the multiples of a 127th of its largest, in fp64."""
    groups = x.float().view(len(x), -1, QUANT_GROUP)
    scales = groups.abs().amax(dim=2, keepdim=True) / 127
    scales = scales.masked_fill(scales == 0, 1.0)
    return ((groups / scales).round().double() * scales.double()).flatten(1)


@needs_rows
@pytest.mark.parametrize("num_outputs", [32, 40])
def test_compiled_agrees_with_exact_arithmetic(num_outputs: int) -> None:
    for num_tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 21):
        weight, x = random_product(num_tokens, num_outputs)
        y = LINEAR_KERNELS["rows"](weight)(x)
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(y.double(), exact, rtol=1 / 128, atol=1e-3)


@needs_rows
@settings(deadline=None)
@given(data=st.data(), form=st.sampled_from(["int8", "int5", "int4"]), seed=st.integers(0, 999))
def test_rounded_products_are_those_of_the_rounded_numbers(
    data: st.DataObject, form: str, seed: int
) -> None:
    num_outputs, num_groups = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 5))
    num_tokens = data.draw(st.integers(1, 15))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_groups * QUANT_GROUP, generator=generator)
    x = torch.randn(num_tokens, num_groups * QUANT_GROUP, generator=generator)
    for tensor in (weight, x):  # groups of very different sizes, of one value, of nothing
        groups = tensor.view(len(tensor), num_groups, QUANT_GROUP)
        sizes = data.draw(st.lists(st.sampled_from([0.0, 1e-30, 0.01, 1.0, 1e4]), min_size=5))
        for group in range(num_groups):
            groups[:, group] *= sizes[group]
        if data.draw(st.booleans()):
            groups[0, 0] = 0.25
    weight, x = weight.bfloat16(), x.bfloat16()
    terms = rounded_inputs(x).unsqueeze(1) * exact_weight(weight, form)
    y = LINEAR_KERNELS[f"rows-{form}"](weight)(x).double()
    # A rounding of the result to bf16, and those of fp32 where large terms cancel.
    slack = terms.sum(dim=2).abs() / 250 + terms.abs().sum(dim=2) * 1e-5 + 1e-37
    assert bool(((y - terms.sum(dim=2)).abs() <= slack).all())


@needs_rows
@pytest.mark.parametrize("form", ["int8", "int5", "int4"])
def test_what_is_not_a_number_stays_in_its_own_rounded_row(form: str) -> None:
    weight, x = random_product(5, 40)
    x[1, 7], x[3, 64] = math.nan, math.inf
    y = LINEAR_KERNELS[f"rows-{form}"](weight)(x)
    assert not bool(y[[1, 3]].isfinite().any())
    assert bool(y[[0, 2, 4]].isfinite().all())


@needs_rows
@pytest.mark.parametrize("form", ["", "-int8", "-int5", "-int4"])
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


@pytest.mark.parametrize("weights", ["int8", "int5", "int4"])
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_rounded_kernels_of_torch_agree_with_the_rounded_matrix(
    name: str, weights: Literal["int8", "int5", "int4"]
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
@pytest.mark.parametrize("weights", ["int8", "int5", "int4"])
def test_compiled_rounds_as_torch_does(weights: Literal["int8", "int5", "int4"]) -> None:
    weight, _ = random_product(1, 40)
    weight[3, :32] = 0.25  # a group of one value
    weight[4] = 0
    weight[5, 32:64] *= 100
    seen = LINEAR_KERNELS[f"rows-{weights}"](weight)(torch.eye(96).bfloat16()).T.double()
    torch.testing.assert_close(seen, exact_weight(weight, weights), rtol=2**-7, atol=1e-6)
