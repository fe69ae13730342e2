"""Records on disk that survive a crash at any moment: one JSON object a file."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import MagnetarError
from ..settings import data_dir


class Journal(Protocol):
    """Where a controller remembers its last record."""

    def read(self) -> dict[str, Any] | None:
        """The last record, or None."""
        ...

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record; it is on disk when this returns."""
        ...

    def forget(self) -> None:
        """Remove the record; fine if there is none."""
        ...


class FileJournal:
    """A journal in one file, replaced atomically."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """The last record, or None where there is no file.

        Raises:
            MagnetarError: the file is not a JSON object.
        """
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise MagnetarError(f"{self.path} is damaged ({error}); remove it") from error
        if not isinstance(record, dict):
            raise MagnetarError(f"{self.path} is damaged (not a JSON object); remove it")
        return record

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record; readable by this user alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def forget(self) -> None:
        """Remove the file; fine if there is none."""
        self.path.unlink(missing_ok=True)


def controller_journal(name: str) -> FileJournal:
    """What the controller of a deployment remembers, on the machine where it runs."""
    return FileJournal(data_dir() / "controllers" / f"{name}.json")


def deployment_record(name: str) -> FileJournal:
    """How to find a deployment from this machine: written by `up`, read by `status`, `down`."""
    return FileJournal(data_dir() / "deployments" / f"{name}.json")


def deployment_records() -> Iterator[FileJournal]:
    """Every deployment that was started from this machine and not taken down."""
    for path in sorted((data_dir() / "deployments").glob("*.json")):
        yield FileJournal(path)
