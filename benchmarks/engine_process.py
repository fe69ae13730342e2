"""Engines as processes: how each is started, told what to measure, and ended."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magnetar.benchmarks.cases import OURS, Engine
from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.synthetic import SHAPES, write_model

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magnetar-benchmarks"
ANSWER_TIMEOUT_S = 240.0
"""For loading, or for one task."""


class Runner:
    """The process of one engine."""

    def __init__(self, engine: Engine, command: Sequence[str]) -> None:
        self.engine = engine
        links = _package_link()
        environment = os.environ | {"PYTHONPATH": str(links), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(CACHE / f"{engine.label.replace('/', '-')}.log").open("w"),
            text=True,
        )
        self.versions: dict[str, str] = {}

    def loaded(self) -> "Runner":
        """Wait until it can measure."""
        self.versions = self._answer()["versions"]
        return self

    def measure(self, task: Task) -> dict[str, Any]:
        """What the engine says, with its rate."""
        assert self._process.stdin is not None
        self._process.stdin.write(task.line() + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return answer | {"rate": answer["num_tokens"] / answer["seconds"]}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        clock = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        clock.start()
        line = self._process.stdout.readline()
        clock.cancel()
        if not line:
            raise RuntimeError(f"{self.engine.label} ended; see its log in {CACHE}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def command(engine: Engine, *, peers: Path, threads: int) -> list[str]:
    """What starts a runner; FileNotFoundError for a peer that is not installed."""
    folder = model_folder(engine.model)
    script = HERE / "peers" / f"{engine.program}_runner.py"
    python = sys.executable
    if engine.program != OURS:
        python = _interpreter(engine.program, peers)
    arguments = [str(folder), "--threads", str(engine.threads or threads)]
    if engine.program == OURS:
        arguments += ["--stages", str(engine.stages), "--dtype", engine.dtype]
        arguments += ["--batch-invariant"] if engine.batch_invariant else []
    if engine.program == "llama":
        bf16 = folder.with_suffix(".gguf")
        if not bf16.exists():
            # In our environment: it reads releases as we do.
            copy = [sys.executable, str(HERE / "peers" / "gguf_copy.py")]
            subprocess.run([*copy, str(folder), str(bf16)], check=True, stdout=sys.stderr)
        arguments = [str(bf16), "--threads", str(threads), "--dtype", engine.dtype]
    return [python, str(script), *arguments]


def _interpreter(program: str, peers: Path) -> str:
    """The peer's own; transformers is in our environment too where there are tests."""
    python = peers / program / "bin" / "python"
    if python.exists():
        return str(python)
    if program == "transformers" and importlib.util.find_spec(program):
        return sys.executable
    raise FileNotFoundError(f"{program} is not in {peers}")


def model_folder(name: str) -> Path:
    """The release of a model, made if it is not there."""
    if name != "demo":
        return write_model(CACHE / name, SHAPES[name])
    from magnetar.fetcher.demo.build import build_demo_release

    return build_demo_release(CACHE / name)


@functools.cache
def _package_link() -> Path:
    """A folder where ``magnetar`` is this repository, for interpreters that do not have it.

    Of this checkout alone: another one may be measured beside it.
    """
    checkout = HERE.parent
    links = CACHE / "links" / hashlib.sha256(bytes(checkout)).hexdigest()[:16]
    links.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (links / "magnetar").symlink_to(checkout, target_is_directory=True)
    return links
