"""Wait for calls to Ray actors without ever blocking for long, and make their errors ours."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InterruptedByUserError, MagnetarError, StageLostError, TimedOutError

POLL_S = 0.2
"""Blocking in Ray while it is torn down may crash the process, so nobody waits longer at once."""


def gather(
    refs: Sequence[Any],
    *,
    who: str,
    stop: threading.Event | None = None,
    timeout_s: float | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> list[Any]:
    """Results of actor calls in order; `meanwhile` runs between polls.

    Raises:
        MagnetarError: the first call that failed, as the error it raised over there.
        StageLostError: an actor died.
        InterruptedByUserError: `stop` was set; the calls go on.
        TimedOutError: `timeout_s` passed.
    """
    import ray

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
        for ref in done:
            _get(ref, who)
        if meanwhile is not None:
            meanwhile()
        if stop is not None and stop.is_set():
            raise InterruptedByUserError("stopped")
        if deadline is not None and pending and time.monotonic() > deadline:
            raise TimedOutError(f"{who} did not answer within {timeout_s:.0f} s")
    return [_get(ref, who) for ref in refs]


def call(ref: Any, *, who: str, timeout_s: float = 30.0) -> Any:
    """The result of one short actor call; raises as `gather` does."""
    return gather([ref], who=who, timeout_s=timeout_s)[0]


def any_ended(refs: Sequence[Any], *, timeout_s: float) -> bool:
    """Whether a call returned or failed within `timeout_s`."""
    import ray

    done, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s)
    return bool(done)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a call came to its end."""

    error: MagnetarError | None
    is_death: bool
    """The process of the actor is gone."""


def endings(refs: Sequence[Any], names: Sequence[str], *, timeout_s: float) -> list[Ending]:
    """How those of the calls ended that ended within `timeout_s`."""
    import ray

    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    found = []
    for ref, name in zip(refs, names, strict=True):
        if ref not in done:
            continue
        try:
            _get(ref, name)
            found.append(Ending(error=None, is_death=False))
        except MagnetarError as error:
            is_death = isinstance(error.__cause__, ray.exceptions.RayActorError)
            found.append(Ending(error=error, is_death=is_death))
    return found


def _get(ref: Any, who: str) -> Any:
    import ray

    try:
        return ray.get(ref, timeout=POLL_S)
    except ray.exceptions.RayTaskError as error:
        raise remote_error(error.cause, who) from error
    except ray.exceptions.RayActorError as error:
        raise StageLostError(f"{who} died: {_reason(error)}") from error
    except ray.exceptions.RayError as error:
        raise MagnetarError(f"{who} failed: {_first_line(error)}") from error


def remote_error(cause: BaseException, who: str) -> MagnetarError:
    """The error of a call as this process raises it."""
    if isinstance(cause, MagnetarError):
        return cause
    return MagnetarError(f"{who} failed: {type(cause).__name__}: {cause}")


def _reason(error: BaseException) -> str:
    """Of an actor whose constructor raised, that error; Ray puts its traceback first."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines and "creation task" in lines[0] else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
