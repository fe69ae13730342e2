"""Text to token ids and back: what every tokenizer offers, and which one a release has."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import TokenizerError
from ...fetcher.checkpoint.json_object import parse_json_object

if TYPE_CHECKING:
    from ...fetcher.checkpoint.release import ReleaseFacts


class Tokenizer(Protocol):
    """Pure and thread-safe once it is loaded.

    Text never becomes a control token (BOS, EOS, chat markers), whatever it spells: whoever wants
    one passes its id.
    """

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; the model's vocabulary may be padded beyond it."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text; None for a tokenizer that puts none there."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """The tokens of `text`; `add_bos` puts `bos_id`, if there is one, before them.

        Raises:
            UsageError: `text` would become a control token.
        """

    def decode(self, ids: list[int]) -> str:
        """The text of `ids` without control tokens; bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        """The bytes that a token adds to a text; none for a control token or a padding id.

        `at_start` says that no token with text comes before: sentencepiece then drops the space
        that encoding put in front of the first word.
        """

    def is_control(self, token_id: int) -> bool:
        """Whether a token has no text of its own."""

    def token_name(self, token_id: int) -> str:
        """A name for logprobs: its text, ``</s>``, or ``bytes:\\xe2`` for half a letter."""

    def control_id(self, name: str) -> int | None:
        """The id of the control token called `name`, such as ``<|im_start|>``."""


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


def name_of_bytes(raw: bytes) -> str:
    """`raw` as text, or ``bytes:\\x..`` as OpenAI writes what is not whole UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
