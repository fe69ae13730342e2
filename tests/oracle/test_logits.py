"""Our logits against those of transformers, in fp32, for every member of the family."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ModelConfig, ReleaseHints
from magnetar.tests.releases import HINTS, LAYOUTS, Dtype, Layout, write_release
from magnetar.tests.stages import MemorySource, Pipeline, config_of, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = ("mixtral", "mixtral-window", "mistral-window", "llama", "llama-tied")
NUM_TOKENS = 70
TOLERANCE = 1e-4


@functools.cache
def oracle(name: str) -> tuple[ModelConfig, MemorySource, list[int], torch.Tensor]:
    """Config, tensors, a prompt and its logits [NUM_TOKENS, V] by transformers."""
    model = _model(name)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 512, (NUM_TOKENS,), generator=generator)
    with torch.no_grad():
        logits = model(prompt.unsqueeze(0)).logits[0]
    assert logits.std() > 1  # else the best token is a toss
    return config_of(model), source_of(model), prompt.tolist(), logits


def _model(name: str) -> PreTrainedModel:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return write_release(
            Path(folder),
            layout="huggingface",
            moe=name.startswith("mixtral"),
            sliding_window=24 if name.endswith("window") else None,
            tie_embeddings=name.endswith("tied"),
            tokenizer=False,
        )


def assert_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_logits_after_every_prefix_agree(name: str) -> None:
    config, source, prompt, logits = oracle(name)
    pipeline = Pipeline(config, source)
    lengths = (1, 2, 15, 16, 17, 24, 25, 33, NUM_TOKENS)
    rows = [pipeline.row(length, prompt[:length]) for length in lengths]
    assert_logits(pipeline.logits(*rows), logits[[length - 1 for length in lengths]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_layout_of_a_release_gives_the_logits_of_its_model(
    tmp_path: Path, layout: Layout, dtype: Dtype
) -> None:
    model = write_release(tmp_path, layout=layout, dtype=dtype)
    facts = read_release(FolderReader(tmp_path), given=ReleaseHints(), known=HINTS)
    source = FileTensorSource(tmp_path, facts.index)
    prompt = oracle("mixtral")[2]
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0, -1]
    # Two stages, each of which reads its own tensors from the files.
    pipeline = Pipeline(facts.config, source, bounds=(0, 2, 4))
    assert_logits(pipeline.logits(pipeline.row(0, prompt))[0], theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_logits_of_a_prompt_in_chunks_agree(name: str, chunk: int) -> None:
    config, source, prompt, logits = oracle(name)
    pipeline = Pipeline(config, source)
    for start in range(0, NUM_TOKENS, chunk):
        part = prompt[start : start + chunk]
        assert_logits(pipeline.logits(pipeline.row(0, part))[0], logits[start + len(part) - 1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scattered", [True, False])
def test_greedy_tokens_are_those_of_transformers_whatever_the_chunks(
    name: str, scattered: bool
) -> None:
    config, source, prompt, _ = oracle(name)
    prompt = prompt[:40]
    tokens = prompt.copy()
    for _ in range(12):
        with torch.no_grad():
            tokens.append(int(_model_of(name)(torch.tensor([tokens])).logits[0, -1].argmax()))
    pipeline = Pipeline(config, source, scattered=scattered)
    for request_id, chunk in enumerate((1, 3, 16, None)):
        assert pipeline.generate(request_id, prompt, 12, chunk=chunk) == tokens[40:]


@functools.cache
def _model_of(name: str) -> PreTrainedModel:
    return _model(name)


@pytest.mark.parametrize("name", ["mixtral", "mistral-window"])
def test_a_batch_gives_the_logits_of_its_rows_alone(name: str) -> None:
    config, source, prompt, _ = oracle(name)
    batch, alone = Pipeline(config, source), Pipeline(config, source)
    parts = [prompt[:9], prompt[5:50], prompt[20:21], prompt[30:64]]
    for turn in range(3):
        rows = [p if turn == 0 else p[turn : turn + 1] for p in parts]
        together = batch.logits(*[batch.row(i, row) for i, row in enumerate(rows) if row])
        one_by_one = [alone.logits(alone.row(i, row)) for i, row in enumerate(rows) if row]
        assert_logits(together, torch.cat(one_by_one))


def test_bf16_stays_near_fp32() -> None:
    # A dense model: rounding moves tokens of a random router to other experts.
    config, source, prompt, logits = oracle("llama")
    pipeline = Pipeline(config, source, dtype="bf16")
    ours = pipeline.logits(pipeline.row(0, prompt))[0]
    assert float(torch.cosine_similarity(ours, logits[-1], dim=0)) > 0.99
