"""The error boundary: whatever a command raises becomes one line and an exit code."""

import argparse
import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
from types import ModuleType

import pytest

from magnetar import cli, errors
from magnetar.commands import deployments, nodes, plans, releases, seeding
from magnetar.commands.console import Console
from magnetar.commands.verb import Body


def ends_with(error: BaseException | None) -> Body:
    def body(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
        if error is not None:
            raise error

    return body


def all_errors(root: type[errors.MagnetarError]) -> list[type[errors.MagnetarError]]:
    return [root, *(below for child in root.__subclasses__() for below in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(errors.MagnetarError))
def test_every_error_ends_with_its_exit_code(
    kind: type[errors.MagnetarError],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(deployments, "status", ends_with(kind("what to do")))
    assert cli.main(["status", "x", "--progress", "plain"]) == kind.exit_code
    assert capsys.readouterr().err == "magnetar: what to do\n"


def test_error_tree_in_the_docstring_is_the_real_one() -> None:
    for kind in all_errors(errors.MagnetarError):
        drawn = [
            line for line in str(errors.__doc__).splitlines() if f" {kind.__name__} " in f" {line}"
        ]
        assert len(drawn) == 1
        assert str(kind.exit_code) in drawn[0].split()


def test_success_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "down", ends_with(None))
    assert cli.main(["down", "x"]) == 0


def test_unexpected_error_is_one_line_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deployments, "down", ends_with(ZeroDivisionError("odd")))
    assert cli.main(["down", "x", "--progress", "plain"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "ZeroDivisionError: odd; --debug shows where" in said


def test_interruption_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = errors.InterruptedByUserError("stopped at 40 %")
    monkeypatch.setattr(releases, "fetch", ends_with(error))
    arguments = ["fetch", "magnet:?xt=a&dn=b c", "--progress", "plain"]
    assert cli.main(arguments) == 130
    first, _, last = capsys.readouterr().err.splitlines()
    assert first == "magnetar: stopped at 40 %"
    assert last == f"  {shlex.join(['magnetar', *arguments])}"


def test_folder_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/read/only")
    monkeypatch.setattr(deployments, "down", ends_with(error))
    assert cli.main(["down", "x", "--progress", "plain"]) == errors.PreflightError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("magnetar: /read/only cannot be used (Read-only file system): ")
    assert "MAGNETAR_HOME" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_sets_the_event_and_leaves_the_handlers_as_they_were(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
        os.kill(os.getpid(), number)
        assert stop.wait(10)
        raise errors.InterruptedByUserError

    before = signal.getsignal(number)
    monkeypatch.setattr(seeding, "seed", body)
    assert cli.main(["seed", "x"]) == 130
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (plans, ["plan", "x"]),
        (nodes, ["nodes"]),
        (deployments, ["status"]),
        (deployments, ["down", "x"]),
        (releases, ["inspect", "x"]),
    ],
)
def test_the_first_signal_ends_what_leaves_nothing_half_done(
    module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.wait(10), "it was asked to stop, not ended"

    monkeypatch.setattr(module, arguments[0], body)
    assert cli.main(arguments) == 130


BODY = """
import sys
from magnetar import cli
from magnetar.commands import seeding
def body(args, console, stop):
    {}
seeding.seed = body
sys.exit(cli.main(["seed", "x", "--progress", "plain"]))
"""


def test_second_signal_kills_a_command_that_does_not_stop() -> None:
    code = BODY.format("console.data('ready'); stop.wait()\n    while True: pass")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert "once more ends it at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_data_into_a_closed_pipe_fails_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", BODY.format("console.data('gone')")],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
