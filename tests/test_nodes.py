"""`magnetar nodes` in a process of its own: it measures, and stops when it is told to."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from magnetar import cli
from magnetar.cluster.inventory.profiles import profiles
from magnetar.tests.command import END_S, magnetar

# Says when it is in the middle of measuring, and stays there.
MEASURING = """
import sys, threading, time
from magnetar import cli
from magnetar.serve import gauge
def read_gbps(*args):
    print("measuring", flush=True)
    while True:
        time.sleep(60)
gauge.ModelGauge.read_gbps = read_gbps
sys.exit(cli.main(["nodes", "--again", "--progress", "plain"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_measuring(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", MEASURING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        _, said = process.communicate(timeout=END_S)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "magnetar: interrupted"
    assert not any(child.is_running() for child in children)
    assert not (tmp_path / "speeds.json").exists()


def test_the_first_signal_ends_it_while_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    with magnetar("nodes", "--again") as nodes:
        assert "measuring" in nodes.until("note")["message"]
        nodes.process.send_signal(signal.SIGINT)
        assert nodes.until("error")["exit_code"] == 130
        assert nodes.process.wait(END_S) == 130


# Measures in text that is executed, as much of what imports and dataclasses do is.
EXECUTING = """
import sys
from magnetar import cli
from magnetar.serve import gauge
def read_gbps(*args):
    exec("import time; print('measuring', flush=True); time.sleep(60)")
gauge.ModelGauge.read_gbps = read_gbps
sys.exit(cli.main(["nodes", "--again", "--progress", "plain"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_code_is_ours_wherever_the_signal_comes(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    (tmp_path / "executing.py").write_text(EXECUTING)
    with subprocess.Popen(
        [sys.executable, "-m", "executing"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "measuring\n"
        process.send_signal(number)
        assert process.wait(END_S) == 130


def test_profiles_are_shown_with_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["nodes", "--profiles", "--progress", "none"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: {profile.source}" in shown for name, profile in profiles().items())
    assert "overheads of cuda: layer: " in shown
    assert cli.main(["nodes", "--profiles", "--progress", "none", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["t4"]["device"]["read_gbps"] == profiles()["t4"].device.read_gbps
    assert not told["h100"]["is_measured"]
    assert cli.main(["nodes", "--profiles", "--progress", "none", "-o", "yaml"]) == 2
