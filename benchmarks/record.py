"""The file of a benchmark that may be continued: what was measured on, and one object a case."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAME = ("cpu", "cores", "threads", "quick")
"""What a machine and a run must share for their results to stand in one file."""


class Record:
    """Results in a file that grows by one as each comes, so that a run cut short goes on later."""

    def __init__(self, file: Path | None, about: Mapping[str, Any]) -> None:
        """`about` is the first line of a new file; without a file nothing is kept.

        Raises:
            ValueError: the file is there and holds a run of something else.
        """
        self._file = file
        self.results: dict[str, dict[str, Any]] = {}
        """By case; one that failed is not among them."""
        if file is None:
            return
        if not file.exists():
            file.write_text(json.dumps(dict(about)) + "\n", encoding="utf-8")
            return
        first, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for name in SAME:
            then, now = first.get(name), about[name]
            if then != now:
                raise ValueError(
                    f"{file} was measured with {name} {then!r}, not {now!r}: give another file"
                )
        self.results = {row["case"]: row for row in rows if "skipped" not in row}

    def add(self, result: dict[str, Any]) -> None:
        """Keep the result of a case; one of a failed case does not count as measured."""
        if "skipped" not in result:
            self.results[result["case"]] = result
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(result) + "\n")
