"""Bencoding (BEP 3), read strictly: the input comes from strangers and its hash is its name."""

from typing import TypeAlias

from ...errors import ReleaseError

Bencoded: TypeAlias = "int | bytes | list[Bencoded] | dict[bytes, Bencoded]"

MAX_DEPTH = 32
MAX_TOKENS = 2_500_000


def encode(value: "Bencoded") -> bytes:
    """The canonical encoding: dictionary keys sorted as raw bytes."""
    parts: list[bytes] = []
    _encode(value, parts)
    return b"".join(parts)


def _encode(value: "Bencoded", parts: list[bytes]) -> None:
    if isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, bytes):
        parts += (b"%d:" % len(value), value)
    elif isinstance(value, list):
        parts.append(b"l")
        for item in value:
            _encode(item, parts)
        parts.append(b"e")
    else:
        parts.append(b"d")
        for key in sorted(value):
            _encode(key, parts)
            _encode(value[key], parts)
        parts.append(b"e")


def decode(raw: bytes) -> "Bencoded":
    """The one value that `raw` holds.

    Raises:
        ReleaseError: malformed, nested deeper than `MAX_DEPTH`, more than `MAX_TOKENS` values,
            a repeated key, or bytes after the end.
    """
    return Decoder(raw).decode()


class Decoder:
    """A decoder that remembers where the values of the outermost dictionary lie."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0
        self._tokens = 0
        self.spans: dict[bytes, tuple[int, int]] = {}
        """Key of the outermost dictionary -> first byte and end of its value."""

    def decode(self) -> "Bencoded":
        """See `decode`."""
        value = self._value(depth=0)
        if self._at != len(self._raw):
            raise self._error(f"{len(self._raw) - self._at} bytes after the end")
        return value

    def _error(self, what: str) -> ReleaseError:
        return ReleaseError(f"malformed torrent metadata at byte {self._at}: {what}; get it anew")

    def _value(self, *, depth: int) -> "Bencoded":
        self._tokens += 1
        if self._tokens > MAX_TOKENS:
            raise self._error(f"more than {MAX_TOKENS} values")
        if depth > MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} deep")
        lead = self._raw[self._at : self._at + 1]
        if lead == b"i":
            return self._integer(self._until(b"e", start=self._at + 1))
        if lead.isdigit():
            return self._string()
        if lead == b"l":
            return self._list(depth)
        if lead == b"d":
            return self._dictionary(depth)
        raise self._error(f"{lead!r} starts no value" if lead else "the data ends too early")

    def _until(self, mark: bytes, *, start: int) -> bytes:
        end = self._raw.find(mark, start, start + 24)
        if end < 0:
            raise self._error("a number without an end")
        self._at = end + 1
        return self._raw[start:end]

    def _integer(self, digits: bytes) -> int:
        unsigned = digits.removeprefix(b"-")
        is_canonical = unsigned.isdigit() and (unsigned[:1] != b"0" or digits == b"0")
        if not is_canonical:
            raise self._error(f"{digits!r} is no canonical number")
        return int(digits)

    def _string(self) -> bytes:
        length = self._integer(self._until(b":", start=self._at))
        start = self._at
        if start + length > len(self._raw):
            raise self._error(f"a string of {length} bytes goes past the end")
        self._at = start + length
        return self._raw[start : self._at]

    def _ended(self) -> bool:
        if self._raw[self._at : self._at + 1] != b"e":
            return False
        self._at += 1
        return True

    def _list(self, depth: int) -> "Bencoded":
        self._at += 1
        items: list[Bencoded] = []
        while not self._ended():
            items.append(self._value(depth=depth + 1))
        return items

    def _dictionary(self, depth: int) -> "Bencoded":
        self._at += 1
        items: dict[bytes, Bencoded] = {}
        while not self._ended():
            if not self._raw[self._at : self._at + 1].isdigit():
                raise self._error("a dictionary key that is no string")
            key = self._string()
            if key in items:
                raise self._error(f"the key {key[:40]!r} comes twice")
            start = self._at
            items[key] = self._value(depth=depth + 1)
            if depth == 0:
                self.spans[key] = (start, self._at)
        return items
