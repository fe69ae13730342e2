"""A part of a model that a user names: ``0-7`` or ``0-31/2,5``. Pure."""

import re
from dataclasses import dataclass

from ..errors import UsageError
from .tensors import TensorEntry, TensorIndex

_FORM = "write LAYERS or LAYERS/EXPERTS, for example 0-7 or 0-31/2,5"


@dataclass(frozen=True, kw_only=True, slots=True)
class Only:
    """Some layers, and of them all experts or some."""

    layers: frozenset[int]
    experts: frozenset[int] | None = None
    """None: all of them. What is no expert of a layer is always part of it."""

    def tensors(self, index: TensorIndex) -> tuple[TensorEntry, ...]:
        """Those of a stage with these layers: the first brings the embeddings, the last the output.

        Raises:
            UsageError: the model has no such layer or expert.
        """
        split = [(_numbers(entry.name), entry) for entry in index]
        _refuse_beyond("layer", self.layers, {layer for (layer, _), _ in split})
        if self.experts is not None:
            _refuse_beyond("expert", self.experts, {expert for (_, expert), _ in split})
        last = max(layer for (layer, _), _ in split)
        found = []
        for (layer, expert), entry in split:
            if layer < 0:
                layer = 0 if entry.name.startswith("tok_embeddings") else last
            if layer in self.layers and (
                expert < 0 or self.experts is None or expert in self.experts
            ):
                found.append(entry)
        return tuple(found)


def parse_only(text: str) -> Only:
    """Reads what a user wrote.

    Raises:
        UsageError: it has another form.
    """
    layers, slash, experts = text.partition("/")
    return Only(layers=_set(layers, text), experts=_set(experts, text) if slash else None)


def _set(text: str, whole: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part, re.ASCII)
        if match is None:
            raise UsageError(f"{whole!r} names no layers: {_FORM}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"{whole!r} counts down from {first} to {last}: {_FORM}")
        found.update(range(first, last + 1))
    return frozenset(found)


def _numbers(name: str) -> tuple[int, int]:
    """Layer and expert of a tensor; -1 where it belongs to none."""
    match = re.match(r"layers\.(\d+)\.(?:.*\.experts\.(\d+)\.)?", name)
    if match is None:
        return -1, -1
    return int(match[1]), -1 if match[2] is None else int(match[2])


def _refuse_beyond(what: str, wanted: frozenset[int], there: set[int]) -> None:
    count = 1 + max(there, default=-1)
    if beyond := sorted(number for number in wanted if number >= count):
        has = f"{count} {what}s, from 0" if count else f"no {what}s"
        raise UsageError(f"there is no {what} {beyond[0]}: the model has {has}")
