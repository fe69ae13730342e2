"""Text out of tokens, piece by piece."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.serve.text.detokenizer import Detokenizer, StopFilter
from magnetar.serve.text.sentencepiece_tokenizer import SentencePieceTokenizer
from magnetar.tests.tokenizers_for_tests import mistral_tokenizer_file

MISTRAL = SentencePieceTokenizer(mistral_tokenizer_file())
IDS = st.lists(st.integers(0, 31999) | st.integers(0, 300), max_size=30)


def deltas(ids: list[int], *, at_start: bool = True) -> list[str]:
    detokenizer = Detokenizer(MISTRAL, at_start=at_start)
    return [*map(detokenizer.feed, ids), detokenizer.finish()]


@given(IDS)
def test_deltas_make_up_the_whole_text(ids: list[int]) -> None:
    assert "".join(deltas(ids)) == MISTRAL.decode(ids)


@given(st.text(min_size=1, max_size=20), st.text(max_size=20))
def test_a_continuation_makes_up_the_rest_of_the_text(before: str, after: str) -> None:
    first = MISTRAL.encode(before, add_bos=True)
    ids = MISTRAL.encode(after, add_bos=False)
    assert MISTRAL.decode(first) + "".join(deltas(ids, at_start=False)) == MISTRAL.decode(
        first + ids
    )


def test_a_letter_of_several_tokens_waits_for_the_last() -> None:
    euro = [3 + byte for byte in "€".encode()]
    assert deltas([6312, *euro, 6312]) == ["hell", "", "", "€", " hell", ""]


def test_a_letter_that_stays_incomplete_is_replaced() -> None:
    assert deltas([6312, 3 + 0xE2, 3 + 0x82]) == ["hell", "", "", "��"]


def test_the_first_space_is_dropped_only_at_the_start_of_a_text() -> None:
    assert deltas([1, 6312, 6312])[:3] == ["", "hell", " hell"]
    assert deltas([6312], at_start=False)[0] == " hell"


def passed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop_filter = StopFilter(stops)
    text = "".join(map(stop_filter.feed, pieces))
    return text + ("" if stop_filter.stopped else stop_filter.finish()), stop_filter.stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "stopped"),
    [
        (["END"], ["one E", "ND two"], "one ", True),
        (["END"], ["one E", "N", "O"], "one ENO", False),
        (["\n\n"], ["a\n", "b\n", "\n"], "a\nb", True),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["abcd", "bc"], ["abcd"], "a", True),
        (["bc", "abc"], ["abc"], "", True),
        ([], ["anything"], "anything", False),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], text: str, stopped: bool) -> None:
    assert passed(stops, pieces) == (text, stopped)


TEXT = st.text(alphabet="abc", max_size=20)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


@given(STOPS, TEXT, st.lists(st.integers(0, 20), max_size=6))
def test_where_the_text_stops_does_not_depend_on_its_pieces(
    stops: list[str], text: str, cuts: list[int]
) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(borders)]
    assert passed(stops, pieces) == passed(stops, list(text)) == passed(stops, [text])


@given(STOPS, TEXT)
def test_the_text_ends_before_the_first_stop_string(stops: list[str], text: str) -> None:
    shown, stopped = passed(stops, list(text))
    assert text.startswith(shown)
    assert stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)


@given(STOPS, TEXT)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(
    stops: list[str], text: str
) -> None:
    stop_filter = StopFilter(stops)
    shown = "".join(map(stop_filter.feed, text))
    if not stop_filter.stopped:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
