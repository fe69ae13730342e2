"""The status of one deployment while it changes: shared between threads, written down each time."""

import threading
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Final

from ...fetcher.progress import Phase, Progress
from ..journal import Journal
from ..spec import DeploymentSpec
from .status import ConditionType, DeploymentStatus, with_condition, without_condition

_FETCHING: Final[tuple[Phase, ...]] = ("metadata", "plan", "download", "verify")


class StatusRecord:
    """The newest status, in memory and in the journal, from which the epoch goes on. Thread-safe.

    Every method that changes it blocks until the journal is on disk.
    """

    def __init__(self, spec: DeploymentSpec, journal: Journal) -> None:
        self._spec = spec
        self._journal = journal
        last = journal.read() or {}
        epoch = int(last.get("epoch", 0)) + 1
        self._status = DeploymentStatus(name=spec.name, model_name=spec.model_name, epoch=epoch)
        self._lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._short_of_room: dict[str, str] = {}
        """By host, what its agent says of its disk."""
        self._room_lock = threading.Lock()

    @property
    def status(self) -> DeploymentStatus:
        """As it is now."""
        with self._lock:
            return self._status

    def change(self, **fields: object) -> None:
        """Replace fields of the status."""
        with self._lock:
            self._status = replace(self._status, **fields)  # type: ignore[arg-type]
        self._write()

    def hold(
        self,
        kind: ConditionType,
        reason: str,
        message: str = "",
        *,
        status: bool = True,
        **fields: object,
    ) -> None:
        """Set one condition, and fields of the status together with it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._lock:
            conditions = with_condition(
                self._status.conditions,
                kind,
                status=status,
                reason=reason,
                message=message,
                now=now,
            )
            self._status = replace(self._status, conditions=conditions, **fields)  # type: ignore[arg-type]
        self._write()

    def note_room(self, progress: Progress) -> None:
        """Keep the condition that tells which nodes wait for room on their disks."""
        with self._room_lock:
            before = dict(self._short_of_room)
            if progress.is_paused:
                self._short_of_room[progress.node] = progress.message
            elif progress.phase in _FETCHING:
                self._short_of_room.pop(progress.node, None)
            if (short := self._short_of_room) == before:
                return
            if short:
                message = "; ".join(f"{host}: {short[host]}" for host in sorted(short))
                self.hold("DiskHasRoom", "DiskFull", message, status=False)
                return
            with self._lock:
                conditions = without_condition(self._status.conditions, "DiskHasRoom")
                self._status = replace(self._status, conditions=conditions)
            self._write()

    def _write(self) -> None:
        with self._journal_lock:  # so that the last to write writes the newest
            status = self._status
            self._journal.write(
                {"epoch": status.epoch, "spec": asdict(self._spec), "status": status.to_json()}
            )
