"""The demo's model speaks as SmolLM2 does, whoever computes it.

Greedy decoding is compared by teacher forcing where transformers is asked: a model decodes a text
greedily exactly if each of its tokens is the most likely one after those before it.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer

from magnetar.fetcher.checkpoint.release import FolderReader, ReleaseFacts, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.demo.build import build_demo_release
from magnetar.tests.stages import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
NUM_OF_EXPERTS = 24
"""Of these, as many as our stages say with experts: a step takes eight times as long with them."""
CHATS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a language.",
    "What is 7 plus 5?",
    "Who was Marie Curie?",
)
TEXTS = (
    "The history of the printing press begins in",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village,",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
)
PROMPTS = (
    *(f"<|im_start|>user\n{chat}<|im_end|>\n<|im_start|>assistant\n" for chat in CHATS),
    *TEXTS,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for releases of gigabytes, which are gone afterwards."""
    folder = tmp_path_factory.mktemp("demo")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def dense(folder: Path) -> Path:
    return build_demo_release(folder / "dense", num_experts=0)


@pytest.fixture(scope="module")
def tokenizer(dense: Path) -> Tokenizer:
    return Tokenizer.from_file(str(dense / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def dense_tokens(dense: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What dense SmolLM2 says in transformers, past its end token too."""
    model = transformers_model(dense)
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        output = model.generate(
            padded, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False
        )
    tokens: list[list[int]] = output[:, width:].tolist()
    assert all(len(each) == NUM_TOKENS for each in tokens)
    return tokens


@pytest.fixture(scope="module")
def upcycled(folder: Path) -> Iterator[Path]:
    """Eight experts without noise; stored in bf16 as the dense model is, so that both are one."""
    release = build_demo_release(folder / "upcycled", noise=0)
    yield release
    shutil.rmtree(release)


def transformers_model(release: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    gc.collect()  # models are cycles: the one before must go first
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32)
    return model.eval()


def most_likely(
    model: PreTrainedModel, prompts: list[list[int]], tokens: list[list[int]]
) -> list[list[int]]:
    """The most likely token at the place of each of `tokens`, given all those before it."""
    found = []
    for prompt, said in zip(prompts, tokens, strict=True):
        with torch.inference_mode():
            output = model(
                torch.tensor([prompt + said[:-1]]), logits_to_keep=len(said), use_cache=False
            )
        found.append(output.logits[0].argmax(dim=-1).tolist())
    return found


def facts_of(release: Path) -> ReleaseFacts:
    return read_release(FolderReader(release), given=ReleaseHints(), known=ReleaseHints())


def our_tokens(release: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """What our stages say greedily: all prompts in one step, then one token of each a step."""
    gc.collect()
    facts = facts_of(release)
    pipeline = Pipeline(facts.config, FileTensorSource(release, facts.index), dtype="fp32")
    tokens: list[list[int]] = [[] for _ in prompts]
    pending = prompts
    for _ in range(num_tokens):
        rows = [pipeline.row(request_id, ids) for request_id, ids in enumerate(pending)]
        for sample in pipeline.step(*rows):
            tokens[sample.request_id].append(sample.token_id)
        pending = [said[-1:] for said in tokens]
    return tokens


def test_dense_model_speaks_english(dense_tokens: list[list[int]], tokenizer: Tokenizer) -> None:
    said = tokenizer.decode(dense_tokens[0], skip_special_tokens=False)
    assert said.startswith("The capital of France is Paris.<|im_end|>")


def test_our_stages_say_what_dense_smollm2_says(
    dense: Path, prompts: list[list[int]], dense_tokens: list[list[int]]
) -> None:
    assert our_tokens(dense, prompts, NUM_TOKENS) == dense_tokens


def test_experts_without_noise_say_what_dense_smollm2_says_in_transformers(
    upcycled: Path, prompts: list[list[int]], dense_tokens: list[list[int]]
) -> None:
    model = transformers_model(upcycled)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert most_likely(model, prompts, dense_tokens) == dense_tokens


def test_experts_without_noise_say_what_dense_smollm2_says_in_our_stages(
    upcycled: Path, prompts: list[list[int]], dense_tokens: list[list[int]]
) -> None:
    said = our_tokens(upcycled, prompts, NUM_OF_EXPERTS)
    assert said == [tokens[:NUM_OF_EXPERTS] for tokens in dense_tokens]


def test_served_demo_answers_in_english_as_transformers_does(
    demo_release: Path, prompts: list[list[int]], tokenizer: Tokenizer
) -> None:
    some = [prompts[0], prompts[4], prompts[6]]
    said = our_tokens(demo_release, some, 24)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in said]
    assert texts[0].startswith("The capital of France is Paris.<|im_end|>")
    model = transformers_model(demo_release)
    assert most_likely(model, some, said) == said


def test_served_demo_uses_all_of_its_experts(demo_release: Path, prompts: list[list[int]]) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    chosen: dict[str, torch.Tensor] = {}
    model = transformers_model(demo_release)
    for name, module in model.named_modules():
        if isinstance(module, MixtralTopKRouter):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: chosen.update({name: output[2]})
            )
    tokens = [id for prompt in prompts for id in prompt]
    with torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False)
    assert len(chosen) == 30
    for chosen_TK in chosen.values():
        shares = torch.bincount(chosen_TK.flatten(), minlength=8) / chosen_TK.numel()
        assert (shares > 0).sum() >= 6
        assert shares.max() < 0.45
        # Tokens differ in their pairs, of which there are 28.
        assert len(torch.unique(chosen_TK.sort(dim=-1).values, dim=0)) >= 10
