from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.errors import ReleaseError
from magnetar.fetcher.torrent.bencode import MAX_DEPTH, Decoder, decode, encode

values = st.recursive(
    st.integers() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=8), inner),
    max_leaves=20,
)


@given(values.filter(lambda value: len(str(value)) < 2000))
def test_decodes_what_it_encodes(value: Any) -> None:
    if any(digits > 22 for digits in map(len, _integers(value))):
        return
    assert decode(encode(value)) == value


def _integers(value: Any) -> Iterator[str]:
    if isinstance(value, int):
        yield str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _integers(item)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_decode_or_raise_a_release_error(raw: bytes) -> None:
    try:
        value = decode(raw)
    except ReleaseError:
        return
    assert encode(value) == raw or isinstance(value, list | dict)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "too early"),
        (b"i1", "without an end"),
        (b"i01e", "canonical"),
        (b"i-0e", "canonical"),
        (b"ie", "canonical"),
        (b"5:abc", "past the end"),
        (b"05:hello", "canonical"),
        (b"i1ei2e", "after the end"),
        (b"d1:ai1e1:ai2ee", "comes twice"),
        (b"di1ei2ee", "no string"),
        (b"x", "starts no value"),
        (b"l" * (MAX_DEPTH + 2) + b"e" * (MAX_DEPTH + 2), "deep"),
    ],
)
def test_refuses_malformed_input(raw: bytes, reason: str) -> None:
    with pytest.raises(ReleaseError, match=reason):
        decode(raw)


def test_remembers_where_values_of_the_outer_dictionary_lie() -> None:
    raw = encode({b"info": {b"name": b"x"}, b"a": 1})
    decoder = Decoder(raw)
    decoder.decode()
    start, end = decoder.spans[b"info"]
    assert raw[start:end] == b"d4:name1:xe"
