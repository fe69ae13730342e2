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
from typing import TYPE_CHECKING, Literal, Protocol, Self, TextIO, get_args

from ..fetcher.progress import Progress
from .phases import PhaseState, format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.table import Table

ProgressMode = Literal["auto", "bar", "plain", "json", "none"]
PROGRESS_MODES: tuple[ProgressMode, ...] = get_args(ProgressMode)
Clock = Callable[[], float]

_JSON_INTERVAL_S = 1.0
_PLAIN_INTERVAL_S = 10.0
_BAR_COLUMNS = 90
"""On a narrower terminal the numbers take the room of the bar."""


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

    def pause(self) -> None:
        """Leaves what is shown on the screen as it is, so that data may follow."""
        ...


class SilentView:
    """Nothing but notes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def progress(self, progress: Progress) -> None:
        pass

    def note(self, text: str, kind: str) -> None:
        _write_line(self._stream, _headed(text, kind))

    def event(self, kind: str, fields: dict[str, object]) -> None:
        pass

    def pause(self) -> None:
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
                "eta_s": None if eta_s is None else round(eta_s, 1),
                "elapsed_s": round(now - began, 3),
                "message": progress.message,
                "finished": progress.finished,
            },
        )

    def note(self, text: str, kind: str) -> None:
        self.event(kind, {"message": text})

    def event(self, kind: str, fields: dict[str, object]) -> None:
        _write_line(self._stream, json.dumps({"event": kind, **fields}))

    def pause(self) -> None:
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
            parts.append(f"{format_bytes(total.rate_bytes_per_s)}/s")
            if total.eta_s is not None:
                parts.append(f"{format_duration(total.eta_s)} left")
        parts.append(phase.message)
        return f"{phase.phase}: {', '.join(part for part in parts if part) or 'begins'}"


class BarView:
    """One live line per phase on a terminal."""

    def __init__(self, terminal: "RichConsole", clock: Clock = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._phases: dict[str, PhaseState] = {}
        self._live: Live | None = None
        # rich has a lock of its own and calls `_table` while it holds it. So the order is: this
        # lock for the life of the display, then rich's, then the one for the phases alone.
        self._live_lock = threading.Lock()
        self._phases_lock = threading.Lock()
        self._spinner: Spinner | None = None

    def progress(self, progress: Progress) -> None:
        now = self._clock()
        with self._phases_lock:
            phase = self._phases.setdefault(progress.phase, PhaseState(progress.phase, now))
            phase.observe(progress, now)
        with self._live_lock:
            if self._live is None:
                self._live = self._new_live()
                self._live.start()

    def note(self, text: str, kind: str) -> None:
        style = {"error": "bold red", "warning": "yellow"}.get(kind)
        self._terminal.print(_headed(text, kind), style=style, markup=False, highlight=False)

    def event(self, kind: str, fields: dict[str, object]) -> None:
        pass

    def pause(self) -> None:
        with self._live_lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
        with self._phases_lock:
            # Lines of finished phases stay on the screen and are not drawn again.
            self._phases = {
                name: phase for name, phase in self._phases.items() if phase.ended is None
            }

    def _new_live(self) -> "Live":
        from rich.live import Live

        return Live(
            console=self._terminal,
            get_renderable=self._table,
            refresh_per_second=8,
            redirect_stdout=False,
        )

    def _table(self) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        now = self._clock()
        plain = self._terminal.options.ascii_only
        # One for all lines and refreshes: it counts time from when it is first drawn.
        spinner = self._spinner = self._spinner or Spinner("line" if plain else "dots")
        has_room = self._terminal.width >= _BAR_COLUMNS
        table = Table.grid(padding=(0, 1), expand=True)
        for _ in range(6):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        with self._phases_lock:
            for phase in self._phases.values():
                total, over = phase.total(), phase.ended is not None
                eta = "" if total.eta_s is None else f"{format_duration(total.eta_s)} left"
                rate = f"{format_bytes(total.rate_bytes_per_s)}/s"
                moves = total.total_bytes and phase.phase not in ("warm", "serving")
                table.add_row(
                    Text("done" if plain else "✓", style="green") if over else spinner,
                    Text(phase.phase, style="bold"),
                    ProgressBar(total=total.total_bytes, completed=total.done_bytes, width=24)
                    if moves and not over and has_room
                    else "",
                    phase.amount(),
                    format_duration(phase.elapsed_s(now))
                    if over or not total.rate_bytes_per_s
                    else rate,
                    "" if over else eta,
                    Text(phase.message, style="dim"),
                )
        return table


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
        self._view.pause()

    def progress(self, progress: Progress) -> None:
        """A `ProgressSink`."""
        self._view.progress(progress)

    def note(self, text: str) -> None:
        """Something that a user should know and that stops nothing."""
        self._view.note(text, "note")

    def warning(self, text: str) -> None:
        """Something that was ignored, clamped or changed."""
        self._view.note(text, "warning")

    def error(self, text: str, *, exit_code: int) -> None:
        """Why the command fails."""
        self._view.pause()
        if isinstance(self._view, JsonView):
            self._view.event("error", {"message": text, "exit_code": exit_code})
        else:
            self._view.note(text, "error")

    def event(self, kind: str, **fields: object) -> None:
        """Something that programs which follow the progress want to know."""
        self._view.event(kind, fields)

    def data(self, text: str) -> None:
        """What the command was asked for: a line, or several, on stdout."""
        self._view.pause()
        _write_line(self._out, text)


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


def _headed(text: str, kind: str) -> str:
    return f"magnetar: {kind}: {text}" if kind != "error" else f"magnetar: {text}"


def _write_line(stream: TextIO, text: str) -> None:
    # One write per line, so that lines of several threads do not mix.
    stream.write(text + "\n")
    stream.flush()
