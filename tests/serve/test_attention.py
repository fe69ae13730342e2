"""Attention over the paged cache against the formula written out."""

import dataclasses
import math

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.step import StepRow
from magnetar.serve.model.attention import Attention
from magnetar.serve.model.batch import lay_out
from magnetar.serve.model.kv_cache import KVCache
from magnetar.serve.model.linear import plain_linear
from magnetar.serve.model.rope import rotate, rotations

CONFIG = ModelConfig(
    dim=24,
    n_layers=1,
    head_dim=8,
    hidden_dim=32,
    n_heads=6,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=256,
)
CPU = torch.device("cpu")


def written_out(
    x: torch.Tensor, wqkv: torch.Tensor, wo: torch.Tensor, window: int | None
) -> torch.Tensor:
    """One sequence from position 0, head by head."""
    num_tokens, group = len(x), CONFIG.n_heads // CONFIG.n_kv_heads
    qkv = (x @ wqkv.T).view(num_tokens, -1, CONFIG.head_dim)
    turns = rotations(torch.arange(num_tokens), head_dim=CONFIG.head_dim, theta=1e4)
    q, k = rotate(qkv[:, :6], turns), rotate(qkv[:, 6:8], turns)
    v, heads = qkv[:, 8:], []
    for head in range(CONFIG.n_heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(CONFIG.head_dim)
        for query in range(num_tokens):
            scores[query, query + 1 :] = -math.inf
            if window is not None:
                scores[query, : max(0, query - window + 1)] = -math.inf
        heads.append(scores.softmax(-1) @ v[:, head // group])
    return torch.cat(heads, dim=-1) @ wo.T


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("chunk", [1, 5, 16, 40])
@pytest.mark.parametrize("table", [[0, 1, 2], [5, 0, 3]])
def test_any_chunking_and_block_order_gives_the_formula(
    window: int | None, chunk: int, table: list[int]
) -> None:
    config = dataclasses.replace(CONFIG, sliding_window=window)
    torch.manual_seed(0)
    wqkv, wo, x = torch.randn(80, 24), torch.randn(24, 48), torch.randn(40, 24)
    attention = Attention(config, wqkv=plain_linear(wqkv), wo=plain_linear(wo))
    cache = KVCache(config, num_blocks=6, dtype=torch.float32, device=CPU)
    # What nobody wrote must not be read.
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    outputs = []
    for start in range(0, 40, chunk):
        part = x[start : start + chunk]
        row = StepRow(request_id=0, position=start, token_ids=(1,) * len(part))
        batch = lay_out([row], {0: table}, config=config, dtype=torch.float32, device=CPU)
        outputs.append(attention.forward(part, batch, cache))
    torch.testing.assert_close(
        torch.cat(outputs), written_out(x, wqkv, wo, window), atol=1e-4, rtol=1e-4
    )


def test_rows_of_a_step_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    wqkv, wo, x = torch.randn(80, 24), torch.randn(24, 48), torch.randn(9, 24)
    attention = Attention(CONFIG, wqkv=plain_linear(wqkv), wo=plain_linear(wo))
    cache = KVCache(CONFIG, num_blocks=2, dtype=torch.float32, device=CPU)
    rows = [
        StepRow(request_id=0, position=0, token_ids=(1,) * 4),
        StepRow(request_id=1, position=0, token_ids=(1,) * 5),
    ]
    batch = lay_out(rows, {0: [1], 1: [0]}, config=CONFIG, dtype=torch.float32, device=CPU)
    together = attention.forward(x, batch, cache)
    torch.testing.assert_close(together[:4], written_out(x[:4], wqkv, wo, None))
    torch.testing.assert_close(together[4:], written_out(x[4:], wqkv, wo, None))
