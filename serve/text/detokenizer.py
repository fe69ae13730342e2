"""Tokens to text while they arrive: no half letters, and nothing of a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_ERRORS = "magnetar-one-per-byte"


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    """Sentencepiece's rule: U+FFFD for each byte that is not part of a letter."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_ERRORS, _one_per_byte)
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one token after the other.

    The pieces that `feed` and `finish` return make up the text of all tokens. `at_start` is false
    when the tokens continue a text: then the space before their first word belongs to it.
    """

    def __init__(self, tokenizer: "Tokenizer", *, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._at_start = at_start
        self._decoder = _Utf8Decoder(errors=_ERRORS)

    def feed(self, token_id: int) -> str:
        """The letters that `token_id` completes; a letter that is not whole waits."""
        if self._tokenizer.is_control(token_id):
            return ""
        raw = self._tokenizer.token_bytes(token_id, at_start=self._at_start)
        self._at_start = False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """What was waiting for bytes that never came, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def decode_tokens(tokenizer: "Tokenizer", ids: Iterable[int]) -> str:
    """The text of all `ids` at once, as `Detokenizer` gives it."""
    detokenizer = Detokenizer(tokenizer, at_start=True)
    return "".join([*map(detokenizer.feed, ids), detokenizer.finish()])


class StopFilter:
    """Lets text through up to the first stop string.

    Which stop string ends the text does not depend on how the text is cut into pieces: it is the
    one that is complete first, and of several that end together the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that cannot be part of a stop string any more; nothing once `stopped`."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        matches = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        num_held = max(_num_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back for a stop string that never became complete."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
