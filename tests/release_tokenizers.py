"""Small real tokenizers for releases of tests, trained on a page of text."""

import functools
import io
import json
from pathlib import Path

CORPUS = """\
The lighthouse keeper counted the ships that passed before breakfast and wrote their names down.
A small boat needs a steady hand, a patient crew and a wind that blows from behind the harbour.
Nobody in the village could remember a winter with so much snow on the northern road.
She opened the window, looked at the grey morning and decided to bake bread instead of walking.
Magnetic fields of neutron stars are the strongest that astronomers have measured anywhere.
Every packet that arrives late is sent again, and every byte is counted once and only once.
Wherever the river bends there is a mill, and wherever there is a mill there are stories.
The teacher asked how many apples were left: 12, 345 or 6789? Nobody knew the right answer!
Questions about time are questions about clocks; questions about clocks are about springs.
Our grandfather kept bees in seven wooden boxes painted yellow, green, orange and white.
To build a bridge you measure twice, cut once, and listen to the people who cross the river.
def add(first, second):
    return first + second  # plain addition of two numbers
They travelled through mountains, forests and meadows without meeting a single other traveller.
What is written quickly is read slowly, and what is written slowly is read with pleasure.
The capital of the province has three theatres, two railway stations and one excellent bakery.
It rained on Monday, on Tuesday and on Wednesday; on Thursday the children played outside again.
"""


@functools.cache
def sentencepiece_model(vocab_size: int = 512) -> bytes:
    """A small sentencepiece BPE model with the options of the release's tokenizer."""
    import sentencepiece

    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=raw,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return raw.getvalue()


@functools.cache
def huggingface_tokenizer(vocab_size: int = 512) -> str:
    """The text of a small tokenizer.json: byte-level BPE with the tokens of ChatML (ids 0-2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return str(tokenizer.to_str())


CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_huggingface_tokenizer(folder: Path, vocab_size: int, *, max_tokens: int) -> None:
    """The files that a release in a Hugging Face layout has of it, with its chat template."""
    (folder / "tokenizer.json").write_text(huggingface_tokenizer(vocab_size), encoding="utf-8")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML_TEMPLATE,
        "model_max_length": max_tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
