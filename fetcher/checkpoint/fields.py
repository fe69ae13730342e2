"""The fields of a release's JSON description, each with the type it must have."""

import json
from typing import Any

from ...errors import ReleaseError
from .stored_tensor import some


class Fields:
    """The fields of one JSON object; `prefix` is where it stands in `file`, for messages."""

    def __init__(self, file: str, found: dict[str, Any], *, prefix: str = "") -> None:
        self.found = found
        self.file = file
        self._prefix = prefix

    def count(self, name: str) -> int:
        """A positive integer that must be there."""
        value = self.optional_count(name)
        if value is None:
            raise ReleaseError(
                f"{self.file} has no {self._prefix}{name}; it does not describe a model of this "
                "family."
            )
        return value

    def optional_count(self, name: str) -> int | None:
        """A positive integer, or None where it is absent or null."""
        value = self.found.get(name)
        if value is None or (type(value) is int and value > 0):
            return value
        raise self._wrong(name, "a positive integer")

    def number(self, name: str) -> float:
        """A number that must be there."""
        value = self.optional_number(name)
        if value is None:
            raise ReleaseError(f"{self.file} has no {self._prefix}{name}.")
        return value

    def optional_number(self, name: str) -> float | None:
        """A number, or None where it is absent or null."""
        value = self.found.get(name)
        if value is None:
            return None
        if type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
        raise self._wrong(name, "a number")

    def flag(self, name: str) -> bool:
        """True or False; False where it is absent or null."""
        value = self.found.get(name)
        if value is None or type(value) is bool:
            return bool(value)
        raise self._wrong(name, "true or false")

    def optional_object(self, name: str) -> dict[str, Any] | None:
        """An object, or None where it is absent or null."""
        value = self.found.get(name)
        if value is None or isinstance(value, dict):
            return value
        raise self._wrong(name, "an object")

    def _wrong(self, name: str, kind: str) -> ReleaseError:
        shown = some([json.dumps(self.found[name])])
        return ReleaseError(f"{self.file} has {self._prefix}{name} {shown}, which is not {kind}.")
