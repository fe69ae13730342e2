"""Whole parts of a layer in one call, against the same parts one by one and against formulas."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.step import StepRow
from magnetar.serve.model.attention import Attention
from magnetar.serve.model.batch import Batch, lay_out
from magnetar.serve.model.feed_forward import FeedForward
from magnetar.serve.model.fused import FusedParts
from magnetar.serve.model.kv_cache import KVCache
from magnetar.serve.model.linear import LINEAR_KERNELS, plain_linear, trusted_rows
from magnetar.serve.model.moe import LoopExperts, MoeLayer
from magnetar.serve.model.norm import rms_norm
from magnetar.serve.model.parts import attention_part, feed_forward_part
from magnetar.settings import KV_BLOCK_TOKENS

pytestmark = pytest.mark.skipif(trusted_rows() is None, reason="no compiler, AVX512-BF16 or VNNI")

CONFIG = ModelConfig(
    dim=64,
    n_layers=1,
    head_dim=32,
    hidden_dim=96,
    n_heads=6,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=32,
    rope_theta=1e4,
    max_context_tokens=1024,
    num_experts=8,
    num_experts_per_tok=2,
)
CPU = torch.device("cpu")
FORMS = ["rows", "rows-int8", "rows-int4"]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def network(form: str, seed: int = 0) -> FeedForward:
    kernel, width = LINEAR_KERNELS[form], CONFIG.hidden_dim
    return FeedForward(
        w13=kernel(random(2 * width, CONFIG.dim, seed=seed, scale=CONFIG.dim**-0.5)),
        w2=kernel(random(CONFIG.dim, width, seed=seed + 100, scale=width**-0.5)),
    )


def moe(form: str) -> MoeLayer:
    gate = LINEAR_KERNELS["rows"](random(8, CONFIG.dim, seed=50))
    return MoeLayer(CONFIG, gate=gate, experts=LoopExperts([network(form, e) for e in range(8)]))


class Feeding:
    """A feed-forward part as compiled functions compute it."""

    def __init__(self, feed_forward: FeedForward | MoeLayer) -> None:
        self.norm = random(CONFIG.dim, seed=1)
        part = feed_forward_part(feed_forward, self.norm, 1e-5)
        assert part is not None
        self.part = part
        self.fused = FusedParts([(0, part)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = StepRow(request_id=0, position=0, token_ids=(0,) * len(x))
        table = range(-(-len(x) // KV_BLOCK_TOKENS))
        batch = lay_out([row], {0: table}, config=CONFIG, dtype=x.dtype, device=CPU)
        return self.fused.forward(x, batch, {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 8000])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_feed_forward_part_is_its_parts_to_the_bit(
    form: str, num_tokens: int, is_sparse: bool
) -> None:
    part = moe(form) if is_sparse else network(form)
    fused, x = Feeding(part), random(num_tokens, CONFIG.dim, seed=2)
    one_by_one = x + part.forward(rms_norm(x, fused.norm, 1e-5))
    before = part.traffic.totals() if isinstance(part, MoeLayer) else ()
    assert torch.equal(fused.forward(x), one_by_one)
    if isinstance(part, MoeLayer):
        assert part.traffic.totals() == tuple(2 * count for count in before)


@given(num_tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_token_of_a_sparse_part_does_not_depend_on_those_beside_it(
    num_tokens: int, seed: int
) -> None:
    fused = Feeding(moe("rows"))
    x = random(num_tokens, CONFIG.dim, seed=seed)
    alone = torch.cat([fused.forward(token) for token in torch.split(x, 1)])
    assert torch.equal(fused.forward(x), alone)


def test_what_is_not_a_number_stays_in_its_own_row() -> None:
    fused = Feeding(moe("rows"))
    x = random(5, CONFIG.dim)
    x[2, 7] = math.nan
    y = fused.forward(x)
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3, 4]].isfinite().all())


class Sequences:
    """An attention part and sequences of tokens that it computes in rows of any size."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        window: int | None = None,
        form: str = "rows",
        head_dim: int = CONFIG.head_dim,
    ) -> None:
        self.config = dataclasses.replace(CONFIG, sliding_window=window, head_dim=head_dim)
        width, dim = self.config.head_dim, self.config.dim
        self.wqkv = random(10 * width, dim, seed=3, scale=dim**-0.5)
        self.wo = random(dim, 6 * width, seed=4, scale=dim**-0.5)
        self.norm = random(dim, seed=5)
        self.x = [random(length, dim, seed=10 + n) for n, length in enumerate(lengths)]
        kernel = LINEAR_KERNELS[form]
        attention = Attention(self.config, wqkv=kernel(self.wqkv), wo=kernel(self.wo))
        part = attention_part(attention, self.config, self.norm, 1e-5)
        assert part is not None
        self.part = part
        self.fused = FusedParts([(0, part)])
        counts = [-(-length // KV_BLOCK_TOKENS) for length in lengths]
        # Each sequence's blocks lie apart and out of order.
        ids = list(range(sum(counts)))[::-1]
        self.tables = {n: [ids.pop(n % len(ids)) for _ in range(c)] for n, c in enumerate(counts)}
        self.cache = KVCache(self.config, num_blocks=sum(counts), dtype=torch.bfloat16, device=CPU)
        # What nobody wrote must not be read.
        self.cache.keys.fill_(math.nan)
        self.cache.values.fill_(math.nan)

    def batch(self, *parts: tuple[int, int, int]) -> Batch:
        """Rows ``(sequence, start, end)`` of one step."""
        rows = [
            StepRow(request_id=n, position=start, token_ids=(1,) * (end - start))
            for n, start, end in parts
        ]
        return lay_out(rows, self.tables, config=self.config, dtype=torch.bfloat16, device=CPU)

    def step(self, *parts: tuple[int, int, int]) -> list[torch.Tensor]:
        """The outputs of rows ``(sequence, start, end)`` computed together."""
        x = torch.cat([self.x[n][start:end] for n, start, end in parts])
        y = self.fused.forward(x, self.batch(*parts), {0: self.cache})
        return list(torch.split(y, [end - start for _, start, end in parts]))

    def chunks(self, n: int, size: int) -> torch.Tensor:
        """All outputs of one sequence, so many tokens a step."""
        length = len(self.x[n])
        steps = [(n, s, min(s + size, length)) for s in range(0, length, size)]
        return torch.cat([self.step(step)[0] for step in steps])

    def exact(self, n: int) -> torch.Tensor:
        """The same in fp64 by plain torch, apart from its cache."""
        config = self.config
        double = KVCache(
            config, num_blocks=self.cache.keys.shape[0], dtype=torch.float64, device=CPU
        )
        plain = Attention(
            config, wqkv=plain_linear(self.wqkv.double()), wo=plain_linear(self.wo.double())
        )
        row = StepRow(request_id=n, position=0, token_ids=(1,) * len(self.x[n]))
        batch = lay_out([row], self.tables, config=config, dtype=torch.float64, device=CPU)
        x = self.x[n].double()
        return x + plain.forward(rms_norm(x, self.norm.double(), 1e-5), batch, double)


@pytest.mark.parametrize("window", [None, 7, 64, 100])
@pytest.mark.parametrize("length", [1, 17, 64, 65, 200])
def test_attention_is_the_formula_but_for_rounding(window: int | None, length: int) -> None:
    sequences = Sequences([length], window=window)
    y = sequences.chunks(0, 80)
    torch.testing.assert_close(y.double(), sequences.exact(0), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
def test_heads_may_have_any_multiple_of_16(head_dim: int) -> None:
    sequences = Sequences([100], head_dim=head_dim)
    y = sequences.chunks(0, 80)
    torch.testing.assert_close(y.double(), sequences.exact(0), atol=0.04, rtol=0.02)
    assert torch.equal(Sequences([100], head_dim=head_dim).chunks(0, 3), y)


@pytest.mark.parametrize("window", [None, 40])
def test_attention_of_a_token_does_not_depend_on_the_chunking(window: int | None) -> None:
    whole = Sequences([150], window=window).chunks(0, 150)
    for size in (1, 3, 16, 64, 70):
        assert torch.equal(Sequences([150], window=window).chunks(0, size), whole)


def test_attention_of_a_row_does_not_depend_on_those_beside_it() -> None:
    lengths = [1, 90, 33, 64]
    alone = [Sequences(lengths).step((n, 0, length))[0] for n, length in enumerate(lengths)]
    sequences = Sequences(lengths)
    sequences.step((1, 0, 20), (3, 0, 63))
    together = sequences.step((3, 63, 64), (1, 20, 90), (0, 0, 1), (2, 0, 33))
    assert torch.equal(together[0], alone[3][63:])
    assert torch.equal(together[1], alone[1][20:])
    assert torch.equal(together[2], alone[0])
    assert torch.equal(together[3], alone[2])


def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    alone = Sequences([90, 40], form="rows-int8").step((0, 0, 90), (1, 0, 40))
    torch.set_num_threads(3)
    try:
        several = Sequences([90, 40], form="rows-int8").step((0, 0, 90), (1, 0, 40))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.cat(several), torch.cat(alone))


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_parts_in_one_call_are_the_same_one_after_the_other(
    num_threads: int, num_tokens: int
) -> None:
    sequences, others = Sequences([40]), Sequences([40], form="rows-int8")
    sparse = moe("rows")
    feeding, dense = Feeding(sparse), Feeding(network("rows-int4"))
    every = [sequences.part, feeding.part, others.part, dense.part]
    step = sequences.batch((0, 0, num_tokens)), {0: sequences.cache, 1: others.cache}
    x = sequences.x[0][:num_tokens]
    one_by_one = x
    for layer_id, part in zip((0, 0, 1, 1), every, strict=True):
        one_by_one = FusedParts([(layer_id, part)]).forward(one_by_one, *step)
    torch.set_num_threads(num_threads)
    try:
        together = FusedParts(list(zip((0, 0, 1, 1), every, strict=True))).forward(x, *step)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(together, one_by_one)
    assert sum(sparse.traffic.totals()) == 2 * 2 * num_tokens


def test_other_weights_and_sizes_are_left_to_the_parts() -> None:
    norm = random(CONFIG.dim)
    plain = FeedForward(w13=plain_linear(random(192, 64)), w2=plain_linear(random(64, 96)))
    assert feed_forward_part(plain, norm, 1e-5) is None
    attention = Attention(
        CONFIG, wqkv=plain_linear(random(320, 64)), wo=plain_linear(random(64, 192))
    )
    assert attention_part(attention, CONFIG, norm, 1e-5) is None
