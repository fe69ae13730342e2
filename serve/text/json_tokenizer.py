"""The tokenizer of Hugging Face releases: a ``tokenizer.json``."""

import json
from pathlib import Path
from typing import Any

from ...errors import TokenizerError, UsageError
from ...fetcher.checkpoint.json_object import parse_json_object
from ...fetcher.config import ChatFormat
from .detokenizer import decode_tokens
from .tokenizer import name_of_bytes

CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"
_SPACE = "▁"


class JsonTokenizer:
    """`Tokenizer` over a ``tokenizer.json``: byte-level BPE, or a converted sentencepiece model."""

    def __init__(
        self,
        path: Path,
        *,
        eos_ids: frozenset[int] = frozenset(),
        chat_format: ChatFormat = "none",
    ) -> None:
        """Read `path` and, for the end token, the tokenizer_config.json beside it.

        Raises:
            TokenizerError: malformed, of an unknown kind, or ChatML without its two markers.
        """
        import tokenizers

        description = parse_json_object(path.read_bytes(), what=str(path), error=TokenizerError)
        added = _added_tokens(description, path)
        markers = {CHATML_START, CHATML_END} if chat_format == "chatml" else set()
        controls = {
            token["content"]: token["id"]
            for token in added
            if token["special"] or token["content"] in markers
        }
        if missing := markers - controls.keys():
            raise TokenizerError(
                f"{path} lacks {' and '.join(sorted(missing))}, which ChatML needs;"
                " set chat_format to what the model was trained with."
            )
        # Without its control tokens the tokenizer reads what spells one as the text it is.
        description["added_tokens"] = [t for t in added if t["content"] not in controls]
        try:
            whole = tokenizers.Tokenizer.from_file(str(path))
            self._text = tokenizers.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{path} cannot be used ({error}); fetch it again.") from error
        vocabulary = whole.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocabulary.values(), default=-1) + 1
        self._pieces: list[str | None] = [None] * self._vocab_size
        for piece, id in vocabulary.items():
            self._pieces[id] = piece
        self._control_ids = controls
        self._controls = frozenset(controls.values())
        self._bytes, self._drops_first_space = _bytes_of_pieces(
            self._pieces, {t["id"] for t in added}, description.get("decoder"), path
        )
        begins_with = whole.encode("", add_special_tokens=True).ids
        self._bos_id: int | None = begins_with[0] if begins_with else None
        # Unknown text may well become <unk>; every other control token is refused in `encode`.
        self._forbidden = self._controls - {vocabulary.get("<unk>")}
        own_eos = {controls.get(name) for name in _eos_names(path, markers)} - {None}
        self._eos_ids = eos_ids | frozenset(id for id in own_eos if id is not None)

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
        # The batch form lets other threads run; the plain one holds them up for all of a long text.
        [encoding] = self._text.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not self._forbidden.isdisjoint(ids):
            name = next(self._pieces[id] for id in ids if id in self._forbidden)
            raise UsageError(f"The text spells the control token {name}; pass its id instead.")
        return [self._bos_id, *ids] if add_bos and self._bos_id is not None else ids

    def decode(self, ids: list[int]) -> str:
        return decode_tokens(self, ids)

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        if self.is_control(token_id):
            return b""
        raw = self._bytes[token_id]
        if at_start and self._drops_first_space and (self._pieces[token_id] or "")[:1] == _SPACE:
            return raw[1:]
        return raw

    def is_control(self, token_id: int) -> bool:
        return token_id in self._controls or not 0 <= token_id < self._vocab_size

    def token_name(self, token_id: int) -> str:
        if self.is_control(token_id):
            known = 0 <= token_id < self._vocab_size and self._pieces[token_id]
            return known or f"<unused_{token_id}>"
        return name_of_bytes(self._bytes[token_id])

    def control_id(self, name: str) -> int | None:
        return self._control_ids.get(name)


def _added_tokens(description: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    added = description.get("added_tokens") or []
    sound = isinstance(added, list) and all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        and isinstance(token.get("special"), bool)
        for token in added
    )
    if not sound:
        raise TokenizerError(f"added_tokens in {path} is malformed; fetch the release again.")
    return list(added)


def _eos_names(path: Path, markers: set[str]) -> set[str]:
    names = {CHATML_END} & markers
    config_path = path.with_name("tokenizer_config.json")
    if config_path.is_file():
        config = parse_json_object(
            config_path.read_bytes(), what=str(config_path), error=TokenizerError
        )
        eos = config.get("eos_token")
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, str):
            names.add(eos)
    return names


def _bytes_of_pieces(
    pieces: list[str | None], added_ids: set[int], decoder: Any, path: Path
) -> tuple[list[bytes], bool]:
    """What each piece adds to a text, and whether the very first space is dropped."""
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {part.get("type"): part for part in parts if isinstance(part, dict)}
    if "ByteLevel" in kinds:
        alphabet = _byte_level_alphabet()

        def to_bytes(piece: str) -> bytes:
            if all(letter in alphabet for letter in piece):
                return bytes(alphabet[letter] for letter in piece)
            return piece.encode()

        drops_first_space = False
    elif "Metaspace" in kinds or "Replace" in kinds:
        falls_back_to_bytes = "ByteFallback" in kinds

        def to_bytes(piece: str) -> bytes:
            if falls_back_to_bytes and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
                return bytes([int(piece[3:5], 16)])
            return piece.replace(_SPACE, " ").encode()

        metaspace = kinds.get("Metaspace", {})
        drops_first_space = "Strip" in kinds or (
            "Metaspace" in kinds
            and metaspace.get("prepend_scheme", "always") != "never"
            and metaspace.get("add_prefix_space", True)
        )
    else:
        raise TokenizerError(
            f"{path} joins tokens with {sorted(map(str, kinds)) or 'nothing'}; Magnetar knows"
            " byte-level BPE and sentencepiece's rules."
        )
    table = [
        b"" if piece is None else piece.encode() if id in added_ids else to_bytes(piece)
        for id, piece in enumerate(pieces)
    ]
    return table, bool(drops_first_space)


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
