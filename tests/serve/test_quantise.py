"""Weights in 8, 5 and 4 bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.model.quantise import (
    Int4Matrix,
    Int5Matrix,
    Int8Matrix,
    quantise_int4,
    quantise_int5,
    quantise_int8,
)


def random_weight(seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(48, 96, generator=generator) * scale).bfloat16()


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-4, 0.02, 1.0, 300.0]))
def test_no_weight_is_off_by_more_than_half_a_step(seed: int, scale: float) -> None:
    weight = random_weight(seed, scale)
    for matrix, slack in (
        (quantise_int8(weight), 0.55),
        (quantise_int5(weight), 0.9),
        (quantise_int4(weight), 0.7),
    ):
        steps = matrix.group_scales().repeat_interleave(32, dim=1)
        # The levels are exact; the copy that is compared here is rounded to bf16 again.
        again = weight.float().abs() * 2**-8
        error = (matrix.dequantise().float() - weight.float()).abs()
        assert bool((error <= slack * steps + again).all())


@given(seed=st.integers(0, 99), factor=st.sampled_from([2.0, 8.0, 64.0]))
def test_groups_of_other_sizes_beside_them_cost_small_groups_little(
    seed: int, factor: float
) -> None:
    weight = random_weight(seed)
    weight[:, 32:64] *= factor
    small = weight[:, :32].float()
    for quantise, most in ((quantise_int8, 0.012), (quantise_int5, 0.055), (quantise_int4, 0.11)):
        error = (quantise(weight).dequantise()[:, :32].float() - small).norm() / small.norm()
        assert float(error) < most * max(1.0, factor / 16)


@pytest.mark.parametrize("quantise", [quantise_int8, quantise_int5, quantise_int4])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_group_of_one_value_keeps_it(quantise: type, value: float) -> None:
    weight = torch.full((16, 32), value).bfloat16()
    matrix: Int8Matrix | Int5Matrix | Int4Matrix = quantise(weight)
    torch.testing.assert_close(matrix.dequantise(), weight, rtol=0.01, atol=0)


def test_levels_are_those_that_were_packed() -> None:
    matrix = quantise_int4(random_weight(1))
    levels = matrix.levels()
    assert levels.shape == (48, 96)
    assert int(levels.min()) == 0
    assert int(levels.max()) == 15
    assert torch.equal(levels[:, 0::2] | levels[:, 1::2] << 4, matrix.q_NH)
