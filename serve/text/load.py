"""Which tokenizer a release has, read and held against its model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TokenizerError
from ...fetcher.checkpoint.json_object import parse_json_object
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ...fetcher.checkpoint.release import ReleaseFacts


def load_tokenizer(folder: Path, facts: "ReleaseFacts") -> Tokenizer:
    """Read the tokenizer of the complete release in `folder`.

    An answer ends at the union of the end tokens that generation_config.json, config.json and the
    tokenizer itself name, and at ``<|im_end|>`` in a ChatML model.

    Raises:
        TokenizerError: it is missing, unreadable, or has more tokens than the model.
    """
    path = folder / facts.tokenizer_file
    if not path.is_file():
        raise TokenizerError(
            f"{path} is missing; fetch the release again, its tokenizer is part of it."
        )
    eos_ids = _eos_ids_in_config(folder)
    tokenizer: Tokenizer
    if path.suffix == ".json":
        from .json_tokenizer import JsonTokenizer

        tokenizer = JsonTokenizer(path, eos_ids=eos_ids, chat_format=facts.chat_format)
    else:
        from .sentencepiece_tokenizer import SentencePieceTokenizer

        tokenizer = SentencePieceTokenizer(path, eos_ids=eos_ids)
    if tokenizer.vocab_size > facts.config.vocab_size:
        raise TokenizerError(
            f"{path.name} has {tokenizer.vocab_size} tokens but the model only"
            f" {facts.config.vocab_size}; the two are not of the same release."
        )
    if stray := sorted(id for id in tokenizer.eos_ids if id >= facts.config.vocab_size):
        raise TokenizerError(
            f"The end token {stray[0]} is outside the model's vocabulary of"
            f" {facts.config.vocab_size}; correct eos_token_id in {folder}/config.json."
        )
    return tokenizer


def _eos_ids_in_config(folder: Path) -> frozenset[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        config = parse_json_object(path.read_bytes(), what=str(path), error=TokenizerError)
        value: Any = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise TokenizerError(f"eos_token_id in {path} is {value!r}; token ids are expected.")
        found.update(ids)
    return frozenset(found)
