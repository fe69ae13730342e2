"""What a command says while it works: progress and notes on stderr, data on stdout.

On a terminal every phase has one live line; elsewhere every reading is one JSON object on a line
of its own, for programs to follow. Any thread may speak.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO, get_args

from ..fetcher.progress import Progress
from .bar_view import BarView
from .phases import PhaseState, format_duration, format_eta, format_rate, headed

ProgressMode = Literal["auto", "bar", "plain", "json", "none"]
PROGRESS_MODES: tuple[ProgressMode, ...] = get_args(ProgressMode)
Clock = Callable[[], float]

_JSON_INTERVAL_S = 1.0
_PLAIN_INTERVAL_S = 10.0


class View(Protocol):
    """One way to show progress."""

    def progress(self, progress: Progress) -> None:
        """Shows a reading; returns at once."""
        ...

    def note(self, text: str, kind: str) -> None:
        """Shows something that a user should know: a ``note``, ``warning`` or ``error``."""
        ...

    def event(self, kind: str, fields: dict[str, object]) -> None:
        """Tells programs; people are not shown it."""
        ...

    def pause(self, *, failed: bool = False) -> None:
        """Leaves what is done on the screen, so that data may follow; and where it `failed`."""
        ...


class SilentView:
    """Nothing but notes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def progress(self, progress: Progress) -> None:
        pass

    def note(self, text: str, kind: str) -> None:
        _write_line(self._stream, headed(text, kind))

    def event(self, kind: str, fields: dict[str, object]) -> None:
        pass

    def pause(self, *, failed: bool = False) -> None:
        pass


class JsonView:
    """One JSON object a line, a reading of each phase and node at most once a second."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._began: dict[str, float] = {}
        self._told: dict[tuple[str, str], tuple[float, bool]] = {}
        self._lock = threading.Lock()

    def progress(self, progress: Progress) -> None:
        now = self._clock()
        key = (progress.phase, progress.node)
        with self._lock:
            began = self._began.setdefault(progress.phase, now)
            told_at, told_finished = self._told.get(key, (-_JSON_INTERVAL_S, False))
            if now - told_at < _JSON_INTERVAL_S and progress.finished == told_finished:
                return
            self._told[key] = (now, progress.finished)
        eta_s = progress.eta_s
        self.event(
            "progress",
            {
                "phase": progress.phase,
                "node": progress.node,
                "done_bytes": progress.done_bytes,
                "total_bytes": progress.total_bytes,
                "rate_bytes_per_s": round(progress.rate_bytes_per_s),
                "lan_bytes_per_s": round(progress.lan_bytes_per_s),
                "eta_s": None if eta_s is None else round(eta_s, 1),
                "elapsed_s": round(now - began, 3),
                "message": progress.message,
                "finished": progress.finished,
                "paused": progress.is_paused,
                "parts": [round(part, 2) for part in progress.parts],
                "num_layers": progress.num_layers,
                "total_layers": progress.total_layers,
            },
        )

    def note(self, text: str, kind: str) -> None:
        self.event(kind, {"message": text})

    def event(self, kind: str, fields: dict[str, object]) -> None:
        _write_line(self._stream, json.dumps({"event": kind, **fields}))

    def pause(self, *, failed: bool = False) -> None:
        pass


class PlainView(SilentView):
    """A line when a phase begins, now and then while it lasts, and when it ends."""

    def __init__(self, stream: TextIO, clock: Clock = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._phases: dict[str, PhaseState] = {}
        self._told_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def progress(self, progress: Progress) -> None:
        now = self._clock()
        with self._lock:
            phase = self._phases.setdefault(progress.phase, PhaseState(progress.phase, now))
            was_over = phase.ended is not None
            phase.observe(progress, now)
            is_over = phase.ended is not None
            told_at = self._told_at.get(progress.phase, -_PLAIN_INTERVAL_S)
            if is_over == was_over and (is_over or now - told_at < _PLAIN_INTERVAL_S):
                return
            self._told_at[progress.phase] = now
            _write_line(self._stream, self._line(phase, now))

    def _line(self, phase: PhaseState, now: float) -> str:
        total = phase.total()
        parts = [phase.amount()]
        if phase.ended is not None:
            parts.append(f"done in {format_duration(phase.elapsed_s(now))}")
        elif total.rate_bytes_per_s > 0:
            parts += [format_rate(total), format_eta(phase.eta_s())]
        parts.append(phase.message)
        return f"{phase.phase}: {', '.join(part for part in parts if part) or 'begins'}"


class Console:
    """The two streams of one command."""

    def __init__(
        self, mode: ProgressMode = "auto", *, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._view = _view(mode, sys.stderr if err is None else err)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._view.pause(failed=kind is not None)

    def progress(self, progress: Progress) -> None:
        """A `ProgressSink`."""
        self._view.progress(progress)

    def note(self, text: str) -> None:
        """Something that a user should know and that stops nothing."""
        self._view.note(text, "note")

    def warning(self, text: str) -> None:
        """Something that was ignored, clamped or changed."""
        self._view.note(text, "warning")

    def error(self, text: str, *, exit_code: int, **fields: object) -> None:
        """Why the command fails; programs are told `fields` too."""
        self._view.pause(failed=True)
        if isinstance(self._view, JsonView):
            self._view.event("error", {"message": text, "exit_code": exit_code, **fields})
        else:
            self._view.note(text, "error")

    def event(self, kind: str, **fields: object) -> None:
        """Something that programs which follow the progress want to know."""
        self._view.event(kind, fields)

    def data(self, text: str) -> None:
        """What the command was asked for: a line, or several, on stdout."""
        self._view.pause()
        _write_line(self._out, text)


def json_text(value: object) -> str:
    """JSON on stdout: indented where people read it, on one line where programs do."""
    return json.dumps(value, indent=2 if sys.stdout.isatty() else None)


def _view(mode: ProgressMode, stream: TextIO) -> View:
    if mode == "auto":
        mode = "json" if not stream.isatty() else "bar"
        if mode == "bar" and os.environ.get("TERM") in ("dumb", "", None):
            mode = "plain"
    if mode == "bar":
        from rich.console import Console as RichConsole

        return BarView(RichConsole(file=stream, force_terminal=True, soft_wrap=False))
    if mode == "json":
        return JsonView(stream)
    return PlainView(stream) if mode == "plain" else SilentView(stream)


def _write_line(stream: TextIO, text: str) -> None:
    # One write per line, so that lines of several threads do not mix.
    stream.write(text + "\n")
    stream.flush()
