"""Progress on a terminal: a live line for each phase, and one for each node that takes part."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from ..fetcher.progress import NUM_PARTS, Progress
from .phases import (
    PhaseState,
    format_amount,
    format_duration,
    format_eta,
    format_rate,
    headed,
    pieces_bar,
)

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.live import Live
    from rich.spinner import Spinner

Clock = Callable[[], float]

_BAR_COLUMNS: Final = 90
"""On a narrower terminal there are no bars, and one rate in place of two."""
_MAX_NODES: Final = 8
"""Lines of nodes in a phase; those that have furthest to go."""
_MAX_NAME: Final = 16
_ECHO_COLUMNS: Final = 3
"""Left free at the right: the ``^C`` that a terminal echoes must not begin a line of its own."""


class BarView:
    """What is shown is drawn anew several times a second, until `pause`."""

    def __init__(self, terminal: "RichConsole", clock: Clock = time.monotonic) -> None:
        self._terminal = terminal
        self._clock = clock
        self._phases: dict[str, PhaseState] = {}
        self._is_pausing = self._has_failed = False
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
        for line in headed(text, kind).splitlines():
            # An indented line is a link, a command or a quotation: to be copied, not to be broken.
            self._terminal.print(
                line, style=style, markup=False, highlight=False, soft_wrap=line.startswith("  ")
            )

    def event(self, kind: str, fields: dict[str, object]) -> None:
        pass

    def pause(self, *, failed: bool = False) -> None:
        with self._live_lock:
            if self._live is not None:
                self._is_pausing, self._has_failed = True, failed
                # The last picture has no lines that move; without any line it must go as a whole.
                with self._phases_lock:
                    over = any(phase.ended is not None for phase in self._phases.values())
                self._live.transient = not (over or failed)
                self._live.stop()
                self._live, self._is_pausing = None, False
        with self._phases_lock:
            # Lines of finished phases stay on the screen and are not drawn again.
            self._phases = {
                name: phase for name, phase in self._phases.items() if phase.ended is None
            }

    def _new_live(self) -> "Live":
        from rich.live import Live

        return Live(
            console=self._terminal,
            get_renderable=self._picture,
            refresh_per_second=8,
            redirect_stdout=False,
        )

    def _picture(self) -> "RenderableType":
        from rich.console import Group
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        now = self._clock()
        plain = self._terminal.options.ascii_only
        # One for all lines and refreshes: it counts time from when it is first drawn.
        spinner = self._spinner = self._spinner or Spinner("line" if plain else "dots")
        table = Table.grid(padding=(0, 1))
        table.width = self._terminal.width - _ECHO_COLUMNS
        for _ in range(6):
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        has_room, paused = self._terminal.width >= _BAR_COLUMNS, []
        with self._phases_lock:
            for phase in self._phases.values():
                total, over = phase.total(), phase.ended is not None
                if self._is_pausing and not (over or self._has_failed):
                    continue
                mark: RenderableType = spinner
                if over:
                    mark = Text("done" if plain else "✓", style="green")
                elif self._is_pausing:
                    mark = Text("not done" if plain else "✗", style="red")
                table.add_row(
                    mark,
                    Text(phase.phase, style="bold"),
                    "" if over else self._bar(total),
                    phase.amount(),
                    format_duration(phase.elapsed_s(now))
                    if over or not total.rate_bytes_per_s
                    else format_rate(total, sides=has_room),
                    "" if over else format_eta(phase.eta_s()),
                    Text(_message(phase), style="dim"),
                )
                if not over:
                    for cells in self._node_rows(phase.nodes()):
                        table.add_row("", *cells)
                    waiting = [each for each in phase.readings.values() if each.is_paused]
                    paused += [_paused(each) for each in waiting]
        return Group(table, *(Text(text, style="yellow") for text in paused))

    def _node_rows(self, nodes: Sequence[Progress]) -> "Iterator[tuple[RenderableType, ...]]":
        from rich.text import Text

        has_room = self._terminal.width >= _BAR_COLUMNS
        shown = sorted(nodes, key=lambda node: (node.finished, _fraction(node), node.node))
        for node in sorted(shown[:_MAX_NODES], key=lambda node: node.node):
            moves = node.rate_bytes_per_s > 0 and not node.finished
            message = "" if moves or node.finished or node.is_paused else node.message
            if node.total_layers:
                message = f"{node.num_layers}/{node.total_layers} layers"
            yield (
                Text(f"  {node.node[:_MAX_NAME]}", style="dim"),
                self._bar(node),
                format_amount(node),
                "paused" if node.is_paused else format_rate(node, sides=has_room) if moves else "",
                format_eta(node.eta_s) if moves else "",
                Text(message, style="dim"),
            )
        if len(nodes) > _MAX_NODES:
            more = f"  and {len(nodes) - _MAX_NODES} more"
            yield Text(more, style="dim"), "", "", "", "", ""

    def _bar(self, progress: Progress) -> "RenderableType":
        """Of pieces in the order in which they are brought, where they are known."""
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        has_bytes = progress.total_bytes and progress.phase not in ("warm", "serving")
        if not has_bytes or self._terminal.width < _BAR_COLUMNS:
            return ""
        if progress.parts and not progress.finished:
            shades = pieces_bar(progress.parts, plain=self._terminal.options.ascii_only)
            return Text(shades, style="yellow" if progress.is_paused else "cyan")
        done = progress.total_bytes if progress.finished else progress.done_bytes
        return ProgressBar(total=progress.total_bytes, completed=done, width=NUM_PARTS)


def _message(phase: PhaseState) -> str:
    """Nothing that the lines of nodes below say too."""
    own = phase.readings.get("")
    if phase.ended is None and phase.nodes():
        return own.message if own is not None else ""
    return "" if phase.total().is_paused else phase.message


def _fraction(progress: Progress) -> float:
    return progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0


def _paused(progress: Progress) -> str:
    return f"{progress.node}: {progress.message}" if progress.node else progress.message
