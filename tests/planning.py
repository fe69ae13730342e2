"""Models as names and shapes, random clusters and brute force, for tests of placement."""

from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

from magnetar.cluster.search.problem import Problem, Route, Site, evaluate
from magnetar.fetcher.config import ModelConfig
from magnetar.fetcher.tensors import StoredDtype, TensorEntry, TensorIndex

GB = 1_000_000_000
DATA = Path(__file__).parent / "data"
POPULARITY = DATA / "mixtral-expert-popularity.yaml"
"""Expert counts of Mixtral 8x7B over two texts; its head names the source."""


def model(
    *, n_layers: int = 32, dim: int = 4096, num_experts: int = 8, dtype: StoredDtype = "bf16"
) -> tuple[ModelConfig, TensorIndex]:
    """Mixtral 8x7B, or a smaller sister, as names and shapes."""
    hidden, kv_dim, vocab = dim * 7 // 2, dim // 4, 32000
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for layer in range(n_layers):
        at = f"layers.{layer}"
        shapes |= {
            f"{at}.attention.wq.weight": (dim, dim),
            f"{at}.attention.wk.weight": (kv_dim, dim),
            f"{at}.attention.wv.weight": (kv_dim, dim),
            f"{at}.attention.wo.weight": (dim, dim),
            f"{at}.feed_forward.gate.weight": (num_experts, dim),
        }
        for expert in range(num_experts):
            for name, shape in {
                "w1": (hidden, dim),
                "w2": (dim, hidden),
                "w3": (hidden, dim),
            }.items():
                shapes[f"{at}.feed_forward.experts.{expert}.{name}.weight"] = shape
    shapes |= {"norm.weight": (dim,), "output.weight": (vocab, dim)}
    entries = {
        name: TensorEntry(name=name, source_name=name, file="w", offset=0, dtype=dtype, shape=shape)
        for name, shape in shapes.items()
    }
    config = ModelConfig(
        dim=dim,
        n_layers=n_layers,
        head_dim=128,
        hidden_dim=hidden,
        n_heads=dim // 128,
        n_kv_heads=kv_dim // 128,
        norm_eps=1e-5,
        vocab_size=vocab,
        rope_theta=1e6,
        max_context_tokens=32768,
        num_experts=num_experts,
        num_experts_per_tok=2,
    )
    return config, TensorIndex(entries)


MIXTRAL = model()
SMALL = model(n_layers=6, dim=512, num_experts=2)


def random_problem(seed: int, *, num_sites: int, num_layers: int, step_tokens: int = 1) -> Problem:
    """Sites of very different speed and memory behind links that bind."""
    draw = np.random.default_rng(seed)
    seconds = draw.uniform(0.5, 1.5, num_layers)
    needs = draw.uniform(0.8, 1.2, num_layers)
    speeds = draw.uniform(1, 6, num_sites) * (1 + 0.3 * step_tokens)
    sites = tuple(
        Site(
            seconds_L=np.concatenate([[0.0], np.cumsum(seconds * speed)]),
            needs_L=np.concatenate([[0.0], np.cumsum(needs)]),
            capacity=float(draw.uniform(0.2, 1.2) * num_layers),
            first_s=0.1 * speed,
            last_s=0.4 * speed,
            first_bytes=0.5,
            last_bytes=0.7,
        )
        for speed in speeds
    )
    shape = (num_sites, num_sites)
    transfer = draw.uniform(0.01, 4, shape) * step_tokens
    return Problem(
        sites=sites,
        hop_s=transfer + draw.uniform(0.01, 3, shape),
        return_s=draw.uniform(0.01, 3, shape),
        transfer_s=transfer,
        step_tokens=step_tokens,
        streams=8,
    )


def every_route(problem: Problem, *, num_stages: int | None = None) -> Iterator[Route]:
    """All that fit, of that number of stages if it is given."""
    num_layers = problem.num_layers
    longest = min(len(problem.sites), num_layers)
    for count in range(1, longest + 1) if num_stages is None else [num_stages]:
        for order in permutations(range(len(problem.sites)), count):
            for inner in combinations(range(1, num_layers), count - 1):
                ends = (*inner, num_layers)
                if fits(problem, order, ends):
                    yield evaluate(problem, order, ends)


def fits(problem: Problem, order: tuple[int, ...], ends: tuple[int, ...]) -> bool:
    """Whether every site holds its layers."""
    start = 0
    for number, end in zip(order, ends, strict=True):
        site = problem.sites[number]
        need = site.needs_L[end] - site.needs_L[start]
        need += (start == 0) * site.first_bytes + (end == problem.num_layers) * site.last_bytes
        if need > site.capacity:
            return False
        start = end
    return True
