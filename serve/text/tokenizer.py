"""Text to token ids and back: what every tokenizer offers."""

from typing import Protocol


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


def name_of_bytes(raw: bytes) -> str:
    """`raw` as text, or ``bytes:\\x..`` as OpenAI writes what is not whole UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
