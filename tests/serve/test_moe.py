"""Routing and the two ways to compute the experts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.model.feed_forward import FeedForward
from magnetar.serve.model.linear import plain_linear
from magnetar.serve.model.moe import (
    Experts,
    GroupedExperts,
    LoopExperts,
    MoeLayer,
    default_experts_kind,
)

CONFIG = ModelConfig(
    dim=16,
    n_layers=1,
    head_dim=8,
    hidden_dim=24,
    n_heads=2,
    n_kv_heads=1,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=256,
    num_experts=8,
    num_experts_per_tok=2,
)


class Weights:
    """Random weights of one layer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gate = torch.randn(8, 16, generator=generator).to(dtype)
        self.w13 = torch.randn(8, 48, 16, generator=generator).to(dtype)
        self.w2 = torch.randn(8, 16, 24, generator=generator).to(dtype)

    def experts(self, kind: str) -> Experts:
        if kind == "grouped_mm":
            return GroupedExperts(w13=self.w13, w2=self.w2)
        return LoopExperts(
            [
                FeedForward(w13=plain_linear(w13), w2=plain_linear(w2))
                for w13, w2 in zip(self.w13, self.w2, strict=True)
            ]
        )

    def layer(self, kind: str = "loop") -> MoeLayer:
        return MoeLayer(CONFIG, gate=plain_linear(self.gate), experts=self.experts(kind))

    def written_out(self, x: torch.Tensor) -> torch.Tensor:
        """Softmax over all experts, the two best renormalised, one token at a time."""
        tokens = []
        for token in x:
            chosen = (self.gate @ token).softmax(-1).topk(2)
            total = torch.zeros(16)
            for weight, expert in zip(chosen.values, chosen.indices.tolist(), strict=True):
                w1, w3 = self.w13[expert].chunk(2)
                up = F.silu(w1 @ token) * (w3 @ token)
                total += weight / chosen.values.sum() * (self.w2[expert] @ up)
            tokens.append(total)
        return torch.stack(tokens)


@given(num_tokens=st.integers(1, 40), seed=st.integers(0, 100))
def test_both_kinds_give_the_formula(num_tokens: int, seed: int) -> None:
    weights = Weights()
    x = torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(seed))
    expected = weights.written_out(x)
    for kind in ("loop", "grouped_mm"):
        torch.testing.assert_close(weights.layer(kind).forward(x), expected, atol=1e-4, rtol=1e-4)


def test_one_expert_that_takes_all_tokens_leaves_the_others_empty() -> None:
    weights = Weights()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[3, 3]] * 6)
    loop = weights.experts("loop").forward(x, chosen)
    torch.testing.assert_close(weights.experts("grouped_mm").forward(x, chosen), loop)


def test_a_token_alone_and_in_a_batch_come_out_alike() -> None:
    layer = Weights().layer()
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([layer.forward(token.unsqueeze(0)) for token in x])
    torch.testing.assert_close(layer.forward(x), alone, atol=1e-4, rtol=1e-4)


def test_the_weights_of_a_token_sum_to_one_in_fp32() -> None:
    layer = Weights(torch.bfloat16).layer()
    _, weights = layer.route(torch.randn(5, 16).bfloat16())
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


@pytest.mark.parametrize(
    ("dtype", "device", "kind"),
    [
        (torch.bfloat16, "cpu", "loop"),
        (torch.bfloat16, "cuda:0", "grouped_mm"),
        (torch.float16, "cuda:0", "loop"),
    ],
)
def test_the_kind_suits_the_device(dtype: torch.dtype, device: str, kind: str) -> None:
    assert default_experts_kind(dtype=dtype, device=torch.device(device)) == kind


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_every_choice_of_an_expert_is_counted(steps: list[int]) -> None:
    layer = Weights().layer()
    generator = torch.Generator().manual_seed(len(steps))
    expected = torch.zeros(8, dtype=torch.int64)
    for num_tokens in steps:
        x = torch.randn(num_tokens, 16, generator=generator)
        expected += layer.route(x)[0].flatten().bincount(minlength=8)
        layer.forward(x)
    assert layer.traffic.totals() == layer.traffic.totals() == tuple(expected.tolist())


def test_choices_do_not_pile_up_where_nobody_asks() -> None:
    layer = Weights().layer()
    for _ in range(600):
        layer.forward(torch.randn(1, 16))
    assert int(layer.traffic.counts_E.sum()) == 2 * 512
    assert sum(layer.traffic.totals()) == 2 * 600
