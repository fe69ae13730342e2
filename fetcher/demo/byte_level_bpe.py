"""A byte-level BPE vocabulary as the ``tokenizer.json`` of a Hugging Face release."""

import json
from collections.abc import Sequence
from typing import Any, Final

from ...errors import TokenizerError

# What splits a text before BPE, under the name that llama.cpp's converter gives to the rules.
# smollm: every digit (any of Unicode's numerals) for itself, and what is between by GPT-2's
# pattern, which is what `use_regex` stands for; the same as in SmolLM2's own tokenizer.json.
_PRE_TOKENIZERS: Final[dict[str, list[dict[str, Any]]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def tokenizer_json(
    *, tokens: Sequence[str], merges: Sequence[str], control_ids: Sequence[int], pre_tokenizer: str
) -> str:
    """The text of a ``tokenizer.json`` that adds nothing before or after a text.

    `tokens` are in GPT-2's letters for bytes, `merges` are two of them with a space between, and
    the tokens of `control_ids` stand for themselves wherever they are spelt.

    Raises:
        TokenizerError: the splitting rules are not known, or two tokens are the same.
    """
    if pre_tokenizer not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"The vocabulary splits text by the rules {pre_tokenizer!r}; known here: "
            f"{', '.join(_PRE_TOKENIZERS)}."
        )
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise TokenizerError(
            f"{len(tokens) - len(vocab)} of {len(tokens)} tokens are there twice; the file is "
            "damaged."
        )
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": tokens[id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id in control_ids
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre_tokenizer]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": list(merges),
        },
    }
    return json.dumps(described, ensure_ascii=False, indent=1)
