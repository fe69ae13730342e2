"""The arithmetic of reproducible mode: right, and the same for every number of rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from magnetar.errors import PreflightError
from magnetar.serve.model import invariant
from magnetar.serve.model.batch import Span
from magnetar.serve.model.invariant import (
    STRETCH,
    attend_in_stretches,
    in_fixed_shapes,
    invariant_kernel,
    invariant_silu,
)
from magnetar.serve.model.linear import LINEAR_KERNELS

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16


@pytest.fixture
def threads() -> Iterator[range]:
    yield range(1, 4)
    torch.set_num_threads(1)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("name", ["plain", "packed", "plain-int8", "plain-int4", "packed-int4"])
def test_a_row_of_a_product_is_the_same_beside_any_others(name: str, threads: range) -> None:
    dtype = torch.float32 if name in ("plain", "packed") else torch.bfloat16
    weight, x = randn(160, 608, dtype=dtype), randn(65, 608, dtype=dtype)
    linear = invariant_kernel(name, CPU)(weight)
    together = linear(x)
    torch.testing.assert_close(together, LINEAR_KERNELS[name](weight)(x))
    for num_threads, num_rows in itertools.product(threads, (1, 2, 3, 5, 9, 11, 16, 33)):
        torch.set_num_threads(num_threads)
        assert torch.equal(linear(x[7 : 7 + num_rows]), together[7 : 7 + num_rows])


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 130])
def test_on_a_card_every_product_has_the_same_shape(num_rows: int) -> None:
    shapes = []

    def multiply(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x

    x = randn(3, num_rows, 5)
    assert torch.equal(in_fixed_shapes(multiply, x, least_rows=0), 2 * x)
    assert set(shapes) == {(3, 64, 5)}


def test_a_library_that_rounds_rows_by_their_number_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(invariant._LEAST_ROWS, "plain", 1)
    invariant._self_test.cache_clear()
    with pytest.raises(PreflightError, match="without --batch-invariant"):
        invariant_kernel("plain", CPU)
    invariant._self_test.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_is_silu_and_does_not_feel_threads(dtype: torch.dtype, threads: range) -> None:
    x = randn(257, 1408, dtype=dtype) * 4
    together = invariant_silu(x)
    torch.testing.assert_close(together, F.silu(x))
    for num_threads, num_rows in itertools.product(threads, (1, 16, 100, 257)):
        torch.set_num_threads(num_threads)
        assert torch.equal(invariant_silu(x[:num_rows]), together[:num_rows])
    assert invariant_silu(torch.tensor([-200.0, 200.0])).tolist() == [-0.0, 200.0]


def span(position: int, num_tokens: int, num_keys: int, window: int | None = None) -> Span:
    return Span(
        start=0,
        num_tokens=num_tokens,
        position=position,
        window=window,
        block_ids_B=None,
        first_slot=0,
        num_keys=num_keys,
        is_causal=False,
        dtype=torch.float32,
        device=CPU,
    )


def test_attention_makes_no_mask_of_a_chunk_and_all_that_came_before() -> None:
    num_keys = 2 * STRETCH
    q, k = randn(9, HEADS, HEAD_DIM), randn(num_keys, KV_HEADS, HEAD_DIM)
    deep = span(num_keys - 9, 9, num_keys)
    attend_in_stretches(q, k, k, deep)
    assert "mask_QL" not in vars(deep)
    assert deep.mask_QL is not None
    assert "mask_QL" in vars(deep)


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("num_keys", [1, STRETCH, 3 * STRETCH - 9])
def test_attention_is_that_of_torch_and_feels_no_chunks(window: int | None, num_keys: int) -> None:
    q = randn(num_keys, HEADS, HEAD_DIM)
    k, v = randn(num_keys, KV_HEADS, HEAD_DIM), randn(num_keys, KV_HEADS, HEAD_DIM) + 1
    whole = attend_in_stretches(q, k, v, span(0, num_keys, num_keys, window))
    ages = torch.arange(num_keys).unsqueeze(1) - torch.arange(num_keys)
    seen = (ages >= 0) & (ages < (window or num_keys))
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=seen,
        enable_gqa=True,
    )
    torch.testing.assert_close(whole, expected[0].transpose(0, 1).flatten(1))
    for chunk in (1, 3, 100):
        starts = sorted({*range(0, num_keys, max(chunk, num_keys // 8)), num_keys - 1})
        for start in starts:
            end = min(start + chunk, num_keys)
            first = 0 if window is None else max(0, start - window + 1)
            part = attend_in_stretches(
                q[start:end],
                k[first:end],
                v[first:end],
                span(start, end - start, end - first, window),
            )
            assert torch.equal(part, whole[start:end])
