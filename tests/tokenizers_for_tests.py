"""Two tokenizers that tests share: the real one of Mixtral, and a small ChatML one."""

import functools
import importlib.util
from pathlib import Path


@functools.cache
def mistral_tokenizer_file() -> Path:
    """The torrent's own tokenizer.model, which mistral_common ships; nothing of it is imported."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


@functools.cache
def chatml_tokenizer_json() -> str:
    """A byte-level BPE of 400 pieces with ChatML's control tokens, as SmolLM2 has it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the cat sat on the mat and said hello to the whole world, user and assistant"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())
