"""Amounts and numbers as people read them."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple


def gigabytes(num_bytes: int) -> str:
    """Decimal gigabytes for people; small amounts in megabytes."""
    if abs(num_bytes) < 1_000_000_000:
        return f"{num_bytes / 1e6:.0f} MB"
    return f"{num_bytes / 1e9:.1f} GB"


def milliseconds(seconds: float) -> str:
    """Three digits; seconds from one on."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.3g} ms"


def id_ranges(ids: Sequence[int]) -> str:
    """Ascending numbers as ``0-3,6``."""
    found = []
    for _, run in groupby(enumerate(ids), key=lambda each: each[1] - each[0]):
        numbers = [number for _, number in run]
        ends = (numbers[0], numbers[-1])
        found.append(str(ends[0]) if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}")
    return ",".join(found)


def names_text(names: Iterable[str]) -> str:
    """Names in order of their last number, three and more in a row as ``t4-0 to t4-7``; devices of
    three and more such nodes first, as ``t4-0 to t4-7 cpu``."""
    rows = list(_rows(names, _NODE))
    long = [row for row in rows if len(row) > 2 and row[0].device]
    rest = ["".join(each) for row in rows if row not in long for each in row]
    told = [f"{row[0].head}{row[0].number} to {''.join(row[-1])}" for row in long]
    for row in _rows(rest, _LAST):
        texts = ["".join(each) for each in row]
        told += [f"{texts[0]} to {texts[-1]}"] if len(row) > 2 else texts
    return ", ".join(told)


class _Name(NamedTuple):
    """The parts of a name; a number may be missing."""

    head: str
    number: str
    device: str = ""
    """With the space before it."""


_NODE = re.compile(r"([^ ]*?)(\d{0,9})((?: .*)?)", re.DOTALL)
_LAST = re.compile(r"(.*?)(\d{0,9})", re.DOTALL)


def _rows(names: Iterable[str], parts: re.Pattern[str]) -> Iterator[list[_Name]]:
    """In order, those together whose numbers follow each other and whose other parts are alike."""
    split = [_Name(*match.groups()) for name in names if (match := parts.fullmatch(name))]
    split.sort(key=lambda name: (name.head, name.device, int(name.number or -1), name.number))
    for _, run in groupby(enumerate(split), key=lambda each: _rank(*each)):
        yield [name for _, name in run]


def _rank(place: int, name: _Name) -> object:
    """The same for names whose numbers follow each other; of others their own."""
    is_plain = name.number == "0" or (name.number != "" and name.number[0] != "0")
    return (name.head, name.device, int(name.number) - place) if is_plain else name


def layers_text(first_layer: int, end_layer: int) -> str:
    """``layers 0-3``, or ``layer 3``, of layers up to but without `end_layer`."""
    return f"layer{'s' * (end_layer - first_layer > 1)} {id_ranges(range(first_layer, end_layer))}"


def wrapped(line: str, width: int | None) -> list[str]:
    """Lines of at most `width` characters, with every amount beside its unit; None: one line."""
    if width is None or len(line) <= width:
        return [line]
    tied = re.sub(r"(?<=\d) (?=(GB|MB|ms|s|tokens)\b)", "\0", line)
    found = textwrap.wrap(tied, width, subsequent_indent="  ", break_on_hyphens=False)
    return [each.replace("\0", " ") for each in found]
