"""Deleting releases of a store that nobody uses."""

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DownloadError, InterruptedByUserError, PreflightError
from .store import Store, StoredRelease

DEFAULT_AGE_S = 30 * 86_400.0
"""For how long a release must not have been used, unless the user says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """One release of the store, and what becomes of it."""

    release: StoredRelease
    reason: str
    """Why it is kept; empty for one that is deleted."""


def sorted_out(
    store: Store, *, older_than_s: float, clock: Callable[[], float] = time.time
) -> tuple[Garbage, ...]:
    """Which releases would be deleted: those unused for so long. Changes nothing.

    A time in the future counts as now: a clock that jumped back must not cost a release. Zero
    seconds are all releases that nobody uses.
    """
    found = []
    for release in store.releases():
        reason = ""
        if store.release_folder(release.info_hash).is_used():
            reason = "in use"
        elif older_than_s and clock() - release.used_s < older_than_s:
            reason = "used lately"
        found.append(Garbage(release=release, reason=reason))
    return tuple(found)


def collect(
    store: Store,
    *,
    older_than_s: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.time,
) -> tuple[Garbage, ...]:
    """Deletes what `sorted_out` says, and what a crash left of an earlier deletion.

    A release goes out of sight in one step, under its locks, and is deleted then: whatever happens
    in between, nobody finds half of one.

    Raises:
        DownloadError: the disk refuses. InterruptedByUserError: stopped between two releases.
    """
    done = []
    for garbage in sorted_out(store, older_than_s=older_than_s, clock=clock):
        if not garbage.reason:
            if stop.is_set():
                raise InterruptedByUserError("stopped; run it again to delete the rest")
            info_hash = garbage.release.info_hash
            try:
                store.release_folder(info_hash).discard(
                    store.trash / f"{info_hash}.{uuid.uuid4().hex}"
                )
            except PreflightError:
                garbage = Garbage(release=garbage.release, reason="in use")
        done.append(garbage)
        _empty_trash(store)
    _empty_trash(store)
    return tuple(done)


def _empty_trash(store: Store) -> None:
    for folder in store.trash.glob("*"):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue  # Another run empties it too.
        except OSError as error:
            raise DownloadError(
                f"{folder} cannot be deleted ({error.strerror}): delete it by hand"
            ) from error
