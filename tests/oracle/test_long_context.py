"""Long prompts, on a model so small that they take seconds.

At 32k tokens test_retrieval.py compares with transformers; what is here besides, experts, knows no
positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from magnetar.serve.engine.step import StepRow
from magnetar.serve.model.batch import lay_out
from magnetar.settings import KV_BLOCK_TOKENS
from magnetar.tests.stages import GREEDY, Pipeline, config_of, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_TOKENS = 8192
MOST_TOKENS = 32768
CHUNK = 512
PASSKEYS = (0, 3001, 8000)
"""Where in the prompt a token stands that stands nowhere else."""
PASSKEY = 7
TOLERANCE = 1e-4


def tiny_model() -> PreTrainedModel:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=MOST_TOKENS,
        rope_theta=1e6,
        sliding_window=None,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return MixtralForCausalLM(config).eval()


def prompt_of(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(8, 64, (num_tokens,), generator=generator).tolist()
    for position in PASSKEYS:
        if position < num_tokens:
            prompt[position] = PASSKEY
    return prompt


def test_logits_after_8k_tokens_in_chunks_agree() -> None:
    model, prompt = tiny_model(), prompt_of(NUM_TOKENS)
    with torch.no_grad():
        theirs = model(torch.tensor([prompt]), logits_to_keep=1).logits[0]
    assert theirs.std() > 0.5  # else anything agrees
    pipeline = Pipeline(
        config_of(model),
        source_of(model),
        bounds=(0, 1, 2),
        num_kv_blocks=NUM_TOKENS // KV_BLOCK_TOKENS,
    )
    for start in range(0, NUM_TOKENS - CHUNK, CHUNK):
        pipeline.step(pipeline.row(0, prompt[start : start + CHUNK], None))
    ours = pipeline.logits(pipeline.row(0, prompt[-CHUNK:], GREEDY))
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_deep_in_a_prompt_needs_one_mask_of_its_own_rows(dtype: torch.dtype) -> None:
    config = config_of(tiny_model())
    row = StepRow(request_id=0, position=MOST_TOKENS - CHUNK, token_ids=(1,) * CHUNK)
    table = list(range(MOST_TOKENS // KV_BLOCK_TOKENS))
    batch = lay_out([row], {0: table}, config=config, dtype=dtype, device=torch.device("cpu"))
    (span,) = batch.spans
    assert span.mask_QL is not None
    # Two bytes a number in bf16: 32 MiB for the deepest chunk of 32k, shared by all layers.
    assert span.mask_QL.nbytes == CHUNK * MOST_TOKENS * dtype.itemsize
