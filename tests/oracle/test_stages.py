"""However the layers are split, the results are the same to the last bit."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.step import Sample, SamplingParams
from magnetar.tests.releases import write_release
from magnetar.tests.stages import GREEDY, MemorySource, Pipeline, config_of, source_of

NUM_LAYERS = 4
SPLITS = [
    (0, *inner, NUM_LAYERS)
    for num_stages in (1, 2, 3, 4)
    for inner in itertools.combinations(range(1, NUM_LAYERS), num_stages - 1)
]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=11, num_logprobs=5)


@functools.cache
def tiny_model(moe: bool) -> tuple[ModelConfig, MemorySource]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model = write_release(
            Path(folder), layout="huggingface", moe=moe, num_layers=NUM_LAYERS, tokenizer=False
        )
    return config_of(model), source_of(model)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (33, 5, 1)]


@functools.cache
def run(bounds: tuple[int, ...], dtype: str, moe: bool) -> tuple[list[Sample], torch.Tensor]:
    """Samples of ten steps of three requests, and the logits of an eleventh."""
    config, source = tiny_model(moe)
    pipeline = Pipeline(config, source, bounds=bounds, dtype=dtype)
    samplings = [SAMPLED, GREEDY, SAMPLED]
    pending, samples = prompts(), list[Sample]()
    for _ in range(10):
        rows = [pipeline.row(i, pending[i], samplings[i]) for i in range(3)]
        stepped = pipeline.step(*rows)
        samples.extend(stepped)
        pending = [[sampled.token_id] for sampled in stepped]
    return samples, pipeline.logits(*[pipeline.row(i, pending[i]) for i in range(3)])


@pytest.mark.parametrize("bounds", SPLITS[1:], ids=str)
@pytest.mark.parametrize(
    ("dtype", "moe"),
    [("fp32", True), ("bf16", True), ("int8", True), ("int4", True), ("fp32", False)],
)
def test_every_split_is_bit_identical_to_one_stage(
    bounds: tuple[int, ...], dtype: str, moe: bool
) -> None:
    samples, logits = run(bounds, dtype, moe)
    expected_samples, expected_logits = run(SPLITS[0], dtype, moe)
    assert samples == expected_samples
    assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_sampled_tokens_do_not_depend_on_the_other_requests(num_stages: int) -> None:
    config, source = tiny_model(True)
    bounds = SPLITS[0] if num_stages == 1 else (0, *range(1, num_stages), NUM_LAYERS)
    alone = Pipeline(config, source, bounds=bounds).generate(0, prompts()[0], 10, SAMPLED)
    together = [sampled.token_id for sampled in run(SPLITS[0], "fp32", True)[0][::3]]
    assert alone == together
