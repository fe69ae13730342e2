"""The demo's model in 8 and 4 bits says nearly what it says in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.tests.stages import Pipeline

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
NUM_TOKENS = 400
"""In the first few tokens of a text the choice of experts is a near tie: one row of a short text,
which bf16 itself keeps to fp32 at 0.997 only, would outweigh the others."""


def text_logits(release: Path, dtype: str) -> torch.Tensor:
    """Logits after every eighth token of the text.

    By one thread: two that meet in every part of every layer wait for each other for minutes where
    anything else runs.
    """
    facts = read_release(FolderReader(release), given=ReleaseHints(), known=ReleaseHints())
    tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids[:NUM_TOKENS]
    pipeline = Pipeline(facts.config, FileTensorSource(release, facts.index), dtype=dtype)
    steps = [pipeline.logits(pipeline.row(0, ids[at : at + 8])) for at in range(0, len(ids), 8)]
    return torch.cat(steps).double()  # a sum over millions: in fp32 a vector is not its own twin


def test_logits_stay_near_those_of_bf16(demo_release: Path) -> None:
    expected = text_logits(demo_release, "bf16")
    for dtype, least in (("int8", 0.999), ("int4", 0.99)):
        logits = text_logits(demo_release, dtype)
        assert torch.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > least


def test_int4_still_knows_the_capital_of_france(demo_release: Path) -> None:
    facts = read_release(FolderReader(demo_release), given=ReleaseHints(), known=ReleaseHints())
    tokenizer = Tokenizer.from_file(str(demo_release / "tokenizer.json"))
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    pipeline = Pipeline(facts.config, FileTensorSource(demo_release, facts.index), dtype="int4")
    said = tokenizer.decode(pipeline.generate(0, tokenizer.encode(chat).ids, 16))
    assert "Paris" in said
