"""Answers that keep to a JSON schema, a regular expression or a grammar, through llguidance."""

import logging
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ...errors import UsageError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

GrammarKind = Literal["json", "regex", "lark"]
MAX_SOURCE_BYTES = 64 * 2**10
_WHITESPACE = r"[ \n]{0,8}"
"""Between the parts of JSON. Without a bound a model may go on with it for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarSource:
    """A grammar as a client writes it: JSON Schema, a regular expression, or Lark."""

    kind: GrammarKind
    text: str


class GrammarCompiler:
    """Makes grammars over the tokens of one tokenizer. For any thread; compiles one at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def compile(self, source: GrammarSource) -> "CompiledGrammar":
        """Blocks for about a millisecond, the first time for the whole vocabulary.

        llguidance bounds its own steps, so that this ends.

        Raises:
            UsageError: the grammar is too large, malformed, or uses what is not supported; or the
                model has no token to end an answer with.
        """
        from llguidance import LLMatcher

        if len(source.text.encode()) > MAX_SOURCE_BYTES:
            raise UsageError(f"the grammar has more than {MAX_SOURCE_BYTES} bytes; make it smaller")
        with self._lock:
            match source.kind:
                case "json":
                    text = LLMatcher.grammar_from_json_schema(
                        source.text, overrides={"whitespace_pattern": _WHITESPACE}
                    )
                case "regex":
                    text = LLMatcher.grammar_from_regex(source.text)
                case "lark":
                    text = LLMatcher.grammar_from_lark(source.text)
            matcher = LLMatcher(self._tokens, text, log_level=0)
            matcher.compute_bitmask()  # some faults show only now
            if matcher.is_error():
                raise UsageError(f"the grammar cannot be used: {_first_lines(matcher.get_error())}")
            return CompiledGrammar(matcher, frozenset(self._end_ids), self._end_mask)

    def prepare(self) -> None:
        """Read the vocabulary now rather than with the first grammar."""
        with self._lock:
            _ = self._tokens

    @cached_property
    def _end_ids(self) -> list[int]:
        vocab_size = self._tokenizer.vocab_size
        return sorted(token_id for token_id in self._tokenizer.eos_ids if token_id < vocab_size)

    @cached_property
    def _end_mask(self) -> bytes:
        """Nothing but end tokens."""
        mask = bytearray(-(-self._tokenizer.vocab_size // 8))
        for token_id in self._end_ids:
            mask[token_id // 8] |= 1 << token_id % 8
        return bytes(mask)

    @cached_property
    def _tokens(self) -> "LLTokenizer":
        from llguidance import LLTokenizer, TokenizerWrapper

        if not self._end_ids:
            raise UsageError("the model has no end token, which structured output needs")
        vocabulary = _Vocabulary(self._tokenizer, self._end_ids[0])
        return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._end_ids)


class CompiledGrammar:
    """A `Grammar` that was found sound."""

    def __init__(self, matcher: "LLMatcher", end_ids: frozenset[int], end_mask: bytes) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._end_mask = end_mask

    def start(self) -> "GrammarMatcher":
        """At the beginning of an answer."""
        return GrammarMatcher(self._matcher.deep_copy(), self._end_ids, self._end_mask)


class GrammarMatcher:
    """A `Matcher`. Where a grammar runs into llguidance's limits, the answer must end."""

    def __init__(self, matcher: "LLMatcher", end_ids: frozenset[int], end_mask: bytes) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._end_mask = end_mask
        self._is_over = False

    def allowed(self) -> bytes:
        """What may come next, as `StepRow.allowed`; end tokens alone after the end."""
        if not self._is_over:
            mask = self._matcher.compute_bitmask()
            if not self._matcher.is_error():
                return mask
            self._fail()
        return self._end_mask

    def accept(self, token_id: int) -> None:
        """Go on by a token."""
        if self._is_over:
            return
        if token_id in self._end_ids:
            self._is_over = True
        elif not self._matcher.consume_token(token_id):
            self._fail()

    def _fail(self) -> None:
        self._is_over = True
        logger.warning(
            "a grammar gave up, and its answer ends: %s", _first_lines(self._matcher.get_error())
        )


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token_id in range(tokenizer.vocab_size):
            raw = tokenizer.token_bytes(token_id)
            # 0xff marks special tokens to llguidance, and no UTF-8 has it.
            if not raw or b"\xff" in raw:
                self.special_token_ids.append(token_id)
                raw = b"<special %d>" % token_id
            self.tokens.append(raw)
        special = frozenset(self.special_token_ids)
        self._ids = {raw: id for id, raw in enumerate(self.tokens) if id not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """Greedily: sentencepiece would put a space before the text."""
        raw = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        start = 0
        while start < len(raw):
            for end in range(min(len(raw), start + self._longest), start, -1):
                if (token_id := self._ids.get(raw[start:end])) is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                start += 1  # a byte that no token has
        return ids


def _first_lines(error: str) -> str:
    """Without a library's stack."""
    return " ".join(error.split("<backtrace>")[0].split())[:300]
