"""A fast kernel is held to the plain one, without bringing in half of torch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.model.self_test import check_agrees


@given(
    wanted=st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    off=st.floats(-1, 1),
    rtol=st.floats(0, 0.1),
    atol=st.floats(0, 0.1),
)
def test_numbers_agree_as_torch_has_it(
    wanted: list[float], off: float, rtol: float, atol: float
) -> None:
    exact = torch.tensor(wanted, dtype=torch.float64)
    found = exact + off
    try:
        torch.testing.assert_close(found, exact, rtol=rtol, atol=atol)
        agrees = True
    except AssertionError:
        agrees = False
    if agrees:
        check_agrees(found, exact, rtol=rtol, atol=atol)
    else:
        with pytest.raises(ArithmeticError, match="differ by up to"):
            check_agrees(found, exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "found",
    [torch.ones(3), torch.ones(2).bfloat16(), torch.tensor([1.0, float("nan")])],
    ids=["shape", "dtype", "no number"],
)
def test_what_is_not_the_same_kind_of_answer_does_not_agree(found: torch.Tensor) -> None:
    with pytest.raises(ArithmeticError):
        check_agrees(found, torch.ones(2))


def test_choosing_kernels_does_not_import_the_comparisons_of_torch() -> None:
    code = """
import sys, torch
from magnetar.serve.model.linear import default_linear_kernel
from magnetar.serve.model.parts import _parts_work
for weights in ("float", "int8", "int5", "int4"):
    default_linear_kernel(dtype=torch.bfloat16, device=torch.device("cpu"), weights=weights)
_parts_work()
sys.exit("torch.distributed.tensor" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
