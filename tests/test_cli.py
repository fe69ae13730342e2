"""The command line as a user meets it: real processes, their streams and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import magnetar
from magnetar.commands.parser import build_parser

VERBS = (
    "up",
    "demo",
    "plan",
    "nodes",
    "fetch",
    "verify",
    "seed",
    "inspect",
    "store",
    "status",
    "down",
)
Run = subprocess.CompletedProcess[str]


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> Run:
    return subprocess.run(
        [sys.executable, "-m", "magnetar.cli", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_names_every_verb_and_the_exit_codes() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"    {verb} " in done.stdout for verb in VERBS)
    assert "130 interrupted" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_of_everything_fits_a_terminal(verb: str) -> None:
    done = run(*verb.split(), "--help", COLUMNS="80")
    assert done.returncode == 0
    assert "--progress" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version() -> None:
    assert run("--version").stdout == f"magnetar {magnetar.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: COMMAND"),
        (["fech", "x"], "did you mean 'fetch'?"),
        (["up"], "give either SOURCE or -f FILE"),
        (["up", "x", "-f", "y"], "give either SOURCE or -f FILE"),
        (["up", "x", "--stages", "0"], "no whole number above 0"),
        (["up", "x", "--port", "65536"], "no port between 0 and 65535"),
        (["up", "x", "--peer", "nowhere"], "HOST:PORT"),
        (["up", "x", "--dtype", "fp33"], "did you mean 'fp32'?"),
        (["up", "x", "--timeout", "nan"], "no number above 0"),
        (["up", "x", "--sliding-window", "-1"], "no whole number above 0"),
        (["plan", "x", "--diff", "-o", "svg"], "no picture of a difference"),
        (["plan", "x", "--from-traffic", "-o", "svg"], "no picture of a difference"),
        (["inspect"], "required: SOURCE"),
        (["fetch", "magnet:?dn=nothing"], "magnet"),
        (["fetch", "magnet:?xt=urn:btih:xyz"], "magnet"),
        (["up", "magnet:?xt=urn:btih:xyz"], "magnet"),
        (["fetch", __file__], "is no .torrent file"),
    ],
)
def test_what_makes_no_sense_is_usage(arguments: list[str], complaint: str) -> None:
    done = run(*arguments, "--progress", "plain") if arguments else run()
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["fetch", "./no/such/folder"],
        ["inspect", "./no-such.torrent"],
        ["up", "no-such-name"],
        ["plan", "-f", "no-such.yaml"],
        ["seed", "./no/such/folder"],
    ],
)
def test_what_is_not_there_is_not_found(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, "--progress", "plain", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert done.stderr.startswith("magnetar: there is no ") or "not in the catalogue" in done.stderr
    assert done.stderr.count("\n") == 1


def test_misspelt_catalogue_name_is_guessed() -> None:
    assert "did you mean 'mixtral-8x7b'?" in run("inspect", "mixtral-8x7").stderr


def test_bad_manifest_is_usage_with_positions(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "apiVersion: magnetar/v1\nkind: Deployment\nmetadata: {name: X}\n"
        "spec:\n  source: {folder: a}\n  serv: {}\n"
    )
    done = run("plan", "-f", "x.yaml", "--progress", "plain", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "magnetar: x.yaml:3:18: metadata.name: 'X' should be a DNS label: "
        "a-z, 0-9 and - inside, at most 63",
        "    metadata: {name: X}",
        "                     ^",
        "x.yaml:6:3: spec.serv: unknown key 'serv'; did you mean 'serve'?",
        "      serv: {}",
        "      ^",
    ]


def test_off_a_terminal_errors_are_json_objects_on_stderr(tmp_path: Path) -> None:
    done = run("fetch", "./nothing", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert told["event"] == "error"
    assert told["exit_code"] == done.returncode == 4
    assert "nothing" in told["message"]
    assert done.stdout == ""


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    for arguments in (["--debug", "fetch", "./nothing"], ["fetch", "./nothing", "--debug"]):
        assert "Traceback" in run(*arguments, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("--upload-limit", "500kB", 500_000),
        ("--upload-limit", "1.5 MiB/s", 3 << 19),
        ("--upload-limit", "2G", 2_000_000_000),
        ("--upload-limit", "300K", 300_000),
        ("--upload-limit", "0", 0),
        ("--upload-limit", "64000", 64_000),
        ("--stop-after", "90", 90.0),
        ("--stop-after", "1.5h", 5400.0),
        ("--stop-after", "7d", 604_800.0),
        ("--ratio", "1.5", 1.5),
    ],
)
def test_rates_and_times_are_read_as_people_write_them(
    option: str, text: str, value: float
) -> None:
    args = vars(build_parser().parse_args(["seed", "DIR", option, text]))

    assert args[option[2:].replace("-", "_")] == value


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--upload-limit", "0.0001k"),
        ("--upload-limit", "5iB"),
        ("--upload-limit", "fast"),
        ("--stop-after", "0s"),
        ("--stop-after", "1w"),
        ("--tracker", "tracker.example"),
        ("--web-seed", "udp://a.example:1"),
    ],
)
def test_other_rates_times_and_urls_are_refused(
    option: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["seed", "DIR", option, text])
    assert f"argument {option}: " in capsys.readouterr().err
