"""Amounts and numbers as people read them."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby


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
    """Names in order of their last number, three and more in a row as ``t4-0 to t4-7``."""
    split = [(match[1], match[2], name) for name in names if (match := _NUMBERED.fullmatch(name))]
    keyed = sorted(split, key=lambda each: (each[0], int(each[1] or -1), each[1]))
    found: list[str] = []
    for _, run in groupby(enumerate(keyed), key=lambda each: (each[1][0], _rank(*each))):
        row = [name for _, (_, _, name) in run]
        found += [f"{row[0]} to {row[-1]}"] if len(row) > 2 else row
    return ", ".join(found)


_NUMBERED = re.compile(r"(.*?)(\d{0,9})", re.DOTALL)


def _rank(place: int, named: tuple[str, str, str]) -> object:
    """The same for names whose numbers follow each other; of others their own."""
    number = named[1]
    is_plain = number == "0" or (number != "" and number[0] != "0")
    return int(number) - place if is_plain else named[2]


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
