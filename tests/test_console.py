"""Progress is one line per phase for people, one JSON object a line for programs."""

import io
import json
import re
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as RichConsole

from magnetar.commands.bar_view import BarView
from magnetar.commands.console import PROGRESS_MODES, Console, JsonView, PlainView
from magnetar.commands.phases import PhaseState, format_bytes, format_duration
from magnetar.fetcher.progress import Progress


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def download(done: int, *, node: str = "", rate: float = 0.0, message: str = "") -> Progress:
    return Progress(
        phase="download",
        done_bytes=done,
        total_bytes=1000,
        rate_bytes_per_s=rate,
        node=node,
        message=message,
        finished=done == 1000,
    )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (93_405_585_408, "93.4 GB"),
        (281_241_268_224, "281 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_have_three_digits(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (3661, "1:01:01"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.floats(min_value=0, max_value=1e18))
def test_amounts_stay_short(amount: float) -> None:
    assert len(format_bytes(amount)) <= 10
    assert len(format_duration(min(amount, 1e8))) <= 12


def test_phase_sums_its_nodes_and_ends_when_all_have() -> None:
    phase = PhaseState("download", 0.0)
    phase.observe(download(100, node="a", rate=10.0, message="3 peers"), 1.0)
    assert phase.message == "3 peers"
    phase.observe(download(1000, node="b", rate=99.0), 2.0)
    assert not phase.total().finished
    assert phase.total().done_bytes == 1100
    assert phase.total().total_bytes == 2000
    assert phase.total().rate_bytes_per_s == 10.0
    phase.observe(download(200, node="a", message="no peers"), 3.0)
    assert phase.message == "a: no peers"
    phase.observe(download(1000, node="a"), 4.0)
    assert phase.ended == 4.0
    assert phase.elapsed_s(9.0) == 4.0


def test_phase_of_the_deployment_ends_with_its_own_reading_only() -> None:
    phase = PhaseState("download", 0.0)
    phase.observe(Progress(phase="download"), 0.0)
    phase.observe(download(1000, node="a"), 1.0)
    assert not phase.total().finished
    assert phase.total().done_bytes == 1000
    phase.observe(Progress(phase="download", finished=True), 2.0)
    assert phase.ended == 2.0


def test_json_is_one_object_a_line_at_most_once_a_second_and_node() -> None:
    stream, clock = io.StringIO(), FakeClock()
    view = JsonView(stream, clock)
    for done in range(0, 1001, 100):
        view.progress(download(done, rate=250.0))
        view.progress(download(done, node="b"))
        clock.now += 0.25
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    own = [line for line in told if line["node"] == ""]
    assert [line["done_bytes"] for line in own] == [0, 400, 800, 1000]
    assert [line["finished"] for line in own] == [False, False, False, True]
    assert own[1]["eta_s"] == 2.4
    assert own[1]["elapsed_s"] == 1.0
    assert {line["event"] for line in told} == {"progress"}


def test_plain_says_begin_now_and_then_and_end() -> None:
    stream, clock = io.StringIO(), FakeClock()
    view = PlainView(stream, clock)
    for done in range(0, 1001, 100):
        view.progress(download(done, rate=250.0))
        clock.now += 2.5
    assert stream.getvalue().splitlines() == [
        "download: 0 B of 1.00 kB, 250 B/s, 4.0 s left",
        "download: 400 B of 1.00 kB, 250 B/s, 2.4 s left",
        "download: 800 B of 1.00 kB, 250 B/s, 0.8 s left",
        "download: 1.00 kB, done in 25 s",
    ]


def test_bar_draws_one_line_per_phase_and_not_again_after_a_pause() -> None:
    stream, clock = Terminal(), FakeClock()
    view = BarView(RichConsole(file=stream, force_terminal=True, width=100), clock)
    view.progress(Progress(phase="metadata", finished=True, message="4 files"))
    view.progress(download(500, rate=250.0, message="12 peers"))
    clock.now += 2.0
    view.pause(failed=True)
    drawn = stream.getvalue()
    for part in ("metadata", "4 files", "500 B of 1.00 kB", "250 B/s", "2.0 s left", "12 peers"):
        assert part in drawn
    view.progress(download(1000))
    view.pause()
    assert "metadata" not in stream.getvalue()[len(drawn) :]
    assert "4.00" not in stream.getvalue()


def test_what_is_not_done_stays_on_the_screen_only_where_the_command_failed() -> None:
    for failed, left in ((False, "\x1b[?25h"), (True, "✗ download")):
        stream = Terminal()
        view = BarView(RichConsole(file=stream, force_terminal=True, no_color=True, width=80))
        view.progress(download(500))
        view.pause(failed=failed)
        last = re.split(r"\x1b\[2K|\x1b\[1A", stream.getvalue())[-1]
        assert left in re.sub(r"\x1b\[\d*m", "", last)
        assert ("download" in last) == failed


def test_the_live_line_leaves_room_for_the_echo_of_an_interrupt() -> None:
    stream = Terminal()
    view = BarView(RichConsole(file=stream, force_terminal=True, width=80))
    view.progress(download(500, message="long " * 40))
    assert max(map(len, drawn(view, stream))) <= 77


def drawn(view: BarView, stream: io.StringIO) -> list[str]:
    """The last picture, line by line, without colours."""
    view.pause(failed=True)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    lines = text.replace("\r", "\n").splitlines()
    last = max(number for number, line in enumerate(lines) if "download" in line)
    return [line.rstrip() for line in lines[last:] if line.strip()]


def test_bar_draws_a_line_for_each_of_several_nodes() -> None:
    stream, clock = Terminal(), FakeClock()
    view = BarView(RichConsole(file=stream, force_terminal=True, width=120), clock)
    view.progress(Progress(phase="download"))
    parts = (1.0,) * 12 + (0.5,) * 4 + (0.1,) * 4 + (0.0,) * 4
    near = download(600, node="a", rate=90.0, message="release")
    view.progress(replace(near, parts=parts, lan_bytes_per_s=60.0))
    view.progress(download(200, node="b", message="no peers; nothing for 9 s"))
    together, a, b = drawn(view, stream)
    assert "800 B of 2.00 kB" in together
    assert "30 B/s WAN, 60 B/s LAN" in together
    assert "release" not in together
    assert a.split()[:2] == ["a", "█" * 12 + "▒" * 4 + "░" * 4]
    assert "600 B of 1.00 kB" in a
    assert a.endswith("4.4 s left")
    assert together.rstrip().endswith(a[-10:])  # The node that takes longest says when it ends.
    assert b.split()[0] == "b"
    assert b.endswith("no peers; nothing for 9 s")


def test_bar_of_many_nodes_shows_those_with_furthest_to_go() -> None:
    stream = Terminal()
    view = BarView(RichConsole(file=stream, force_terminal=True, width=120))
    for number in range(20):
        view.progress(download(1000 - 10 * number, node=f"n{number:02}", rate=1.0))
    names = [line.split()[0] for line in drawn(view, stream)[1:]]
    assert names == [f"n{number}" for number in range(12, 20)] + ["and"]


def test_bar_tells_in_full_which_node_waits_for_room() -> None:
    stream = Terminal()
    view = BarView(RichConsole(file=stream, force_terminal=True, width=70))
    message = "paused: 93.4 GB are to come and 3.1 MB are free; make room on the disk of /data"
    view.progress(download(600, node="a", rate=90.0))
    view.progress(replace(download(200, node="b", message=message), is_paused=True))
    assert f"b: {message}" in " ".join(line.strip() for line in drawn(view, stream))


def test_json_tells_programs_of_parts_layers_and_pauses() -> None:
    stream = io.StringIO()
    JsonView(stream).progress(
        Progress(
            phase="load",
            parts=(1.0, 1 / 3),
            num_layers=3,
            total_layers=8,
            is_paused=True,
            lan_bytes_per_s=7.2,
        )
    )
    told = json.loads(stream.getvalue())
    assert told["parts"] == [1.0, 0.33]
    assert (told["num_layers"], told["total_layers"]) == (3, 8)
    assert (told["paused"], told["lan_bytes_per_s"]) == (True, 7)


def test_bar_survives_many_threads_that_speak_at_once() -> None:
    view = BarView(RichConsole(file=Terminal(), force_terminal=True, width=100))

    def speak(node: str) -> None:
        for done in range(0, 1001, 50):
            view.progress(download(done, node=node))
            view.note(f"{node} {done}", "note")
        view.pause()

    threads = [threading.Thread(target=speak, args=(f"n{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    view.pause()


def test_data_goes_out_and_everything_else_to_err() -> None:
    for mode in PROGRESS_MODES:
        out, err = io.StringIO(), io.StringIO()
        with Console(mode, out=out, err=err) as console:
            console.note("a note")
            console.progress(download(10))
            console.data("the data")
            console.error("why", exit_code=3)
        assert out.getvalue() == "the data\n"
        assert "a note" in err.getvalue()
        assert "why" in err.getvalue()


def test_auto_is_json_off_a_terminal_and_a_bar_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    off, on = io.StringIO(), Terminal()
    for stream in (off, on):
        with Console("auto", err=stream) as console:
            console.progress(download(10))
    assert json.loads(off.getvalue())["phase"] == "download"
    assert "\x1b[" in on.getvalue()


def test_no_color_leaves_colours_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    drawn = {}
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        stream = Terminal()
        with Console("auto", err=stream) as console:
            console.progress(Progress(phase="metadata", finished=True))
        drawn[value] = stream.getvalue()
    assert "\x1b[32m" in drawn[""]
    assert "\x1b[32m" not in drawn["1"]


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console("auto", err=stream) as console:
        console.progress(download(10))
    assert stream.getvalue() == "download: 10 B of 1.00 kB\n"


def test_magnet_on_a_terminal_is_not_read_as_markup() -> None:
    stream = Terminal()
    view = BarView(RichConsole(file=stream, force_terminal=True, width=200))
    view.note("x.pe=[::1]:80 [bold]", "note")
    assert "[::1]:80 [bold]" in stream.getvalue()


def test_prose_is_broken_between_words_and_what_can_be_copied_not_at_all() -> None:
    stream, command = Terminal(), "  magnetar up " + "x" * 100
    view = BarView(RichConsole(file=stream, force_terminal=True, no_color=True, width=40))
    view.note(f"{'word ' * 20}\n{command}", "note")
    *prose, last = stream.getvalue().splitlines()
    assert last == command
    assert len(prose) > 2
    assert max(map(len, prose)) <= 40
