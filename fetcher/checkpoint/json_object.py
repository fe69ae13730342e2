"""JSON from a release: one object, strictly read."""

import json
from typing import Any

from ...errors import ReleaseError


def parse_json_object(raw: bytes, *, what: str, error: type[ReleaseError]) -> dict[str, Any]:
    """The object that `raw` holds; `what` names it in messages.

    Stricter than `json.loads`: duplicate keys, numbers that are not JSON and anything but an
    object at the top are refused.

    Raises:
        error: whatever is wrong with it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) == len(pairs):
            return parsed
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise error(f"{what} has the key {key[:200]!r} twice; take the release anew.")
            seen.add(key)
        raise AssertionError("fewer keys than pairs without a duplicate")

    def refuse(constant: str) -> Any:
        raise error(f"{what} holds {constant}, which is not JSON; take the release anew.")

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as cause:
        raise error(f"{what} is not valid JSON ({cause}); take the release anew.") from cause
    if not isinstance(parsed, dict):
        raise error(f"{what} is not a JSON object; take the release anew.")
    return parsed
