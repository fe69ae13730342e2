"""The tokenizer of Mistral's own releases: a sentencepiece ``tokenizer.model``."""

from pathlib import Path

from ...errors import TokenizerError
from .detokenizer import decode_tokens
from .tokenizer import name_of_bytes

_SPACE = "▁"


class SentencePieceTokenizer:
    """`Tokenizer` over a ``tokenizer.model``.

    The sentencepiece library itself does the encoding: other implementations differ from it on
    runs of spaces.
    """

    def __init__(self, path: Path, *, eos_ids: frozenset[int] = frozenset()) -> None:
        """Read `path`; `eos_ids` are end tokens besides the model's own.

        Raises:
            TokenizerError: not a sentencepiece model.
        """
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise TokenizerError(
                f"{path} is not a readable sentencepiece model ({error}); fetch it again."
            ) from error
        self._vocab_size: int = self._model.vocab_size()
        self._bos_id: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None
        own_eos = {self._model.eos_id()} if self._model.eos_id() >= 0 else set()
        self._eos_ids = eos_ids | own_eos
        self._pieces: list[str] = [self._model.id_to_piece(id) for id in range(self._vocab_size)]
        self._control_ids = {
            name: id for id, name in enumerate(self._pieces) if self._has_no_text(id)
        }
        self._bytes = [self._read_bytes(id) for id in range(self._vocab_size)]

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return [self._bos_id, *ids] if add_bos and self._bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        return decode_tokens(self, ids)

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        if not 0 <= token_id < self._vocab_size:
            return b""
        raw = self._bytes[token_id]
        return raw[1:] if at_start and self._pieces[token_id].startswith(_SPACE) else raw

    def is_control(self, token_id: int) -> bool:
        return not 0 <= token_id < self._vocab_size or self._has_no_text(token_id)

    def token_name(self, token_id: int) -> str:
        if self.is_control(token_id):
            known = 0 <= token_id < self._vocab_size
            return self._pieces[token_id] if known else f"<unused_{token_id}>"
        return name_of_bytes(self._bytes[token_id])

    def control_id(self, name: str) -> int | None:
        return self._control_ids.get(name)

    def _has_no_text(self, token_id: int) -> bool:
        return bool(self._model.is_control(token_id) or self._model.is_unused(token_id))

    def _read_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        if self._has_no_text(token_id):
            return b""
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return " ⁇ ".encode()  # how sentencepiece writes what it could not read
        return piece.replace(_SPACE, " ").encode()
