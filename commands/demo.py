"""The demo: a real model is made here, seeded by another process, and served from its magnet link.

After the seed stands, everything is exactly the path of ``magnetar up MAGNET --peer ADDRESS``.
"""

import argparse
import contextlib
import json
import selectors
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cluster.spec import DeploymentSpec
from ..errors import InterruptedByUserError, MagnetarError, TimedOutError
from ..fetcher.progress import Progress
from .console import Console
from .option_groups import add_placement, add_serving, add_store
from .serving import need_importable_package, serving
from .verb import Verbs
from .wishes import store_of, with_options

MODEL_NAME = "smollm2-moe"
QUESTION = "What is the capital of France?"
_SEED_START_S = 600.0
"""The first time, the seed hashes the whole release."""
_ANSWER_S = 300.0


@dataclass(frozen=True, slots=True)
class Seed:
    """Where the demo's release can be had."""

    magnet: str
    address: str


def add_demo(verbs: Verbs) -> None:
    """`magnetar demo` and its options."""
    parser = verbs.add(
        "demo",
        demo,
        "serve a small real model that is made and seeded on this machine",
        "Make a small real model, seed it, and serve it from its magnet link. Nothing is "
        "downloaded from the internet. Stays up until Ctrl-C.",
    )
    parser.add_argument(
        "--check", action="store_true", help="ask one question, print the answer, and stop"
    )
    parser.add_argument(
        "--seed-only", action="store_true", help="make and seed the model but do not serve it"
    )
    add_store(parser)
    add_placement(parser)
    add_serving(parser)


def demo(args: argparse.Namespace, console: Console, stop: threading.Event) -> None:
    """Makes, seeds and serves the demo model; with ``--check`` asks it one question and stops."""
    need_importable_package()
    store = store_of(args)
    from ..fetcher.demo.build import build_demo_release

    folder = build_demo_release(
        store / "demo" / MODEL_NAME, on_progress=console.progress, stop=stop
    )
    console.progress(Progress(phase="metadata", message="the seed hashes the release"))
    with seeded(folder, store, stop) as seed:
        if args.seed_only:
            console.data(seed.magnet)
            stop.wait()
            _raise_if(stop)
        console.note(f"seeding {folder} at {seed.address}\n  {seed.magnet}")
        spec = _spec(args, seed, store, console)
        with serving(spec, console, stop, ray_address=args.ray_address) as endpoint:
            if args.check:
                answer = ask(endpoint.url, endpoint.model_name, api_key_file=args.api_key_file)
                console.data(f"Q: {QUESTION}\nA: {answer}")
                return
            endpoint.wait(on_warning=console.warning, on_note=console.note)
    _raise_if(stop)


def _spec(args: argparse.Namespace, seed: Seed, store: Path, console: Console) -> DeploymentSpec:
    from ..manifests.source import deployment_name, resolve_source

    source = resolve_source(
        seed.magnet, peers=(seed.address,), timeout_s=60.0, on_note=console.note
    )
    spec = DeploymentSpec(
        name=deployment_name(MODEL_NAME), source=source, store=str(store), model_name=MODEL_NAME
    )
    return with_options(spec, args)


@contextlib.contextmanager
def seeded(folder: Path, store: Path, stop: threading.Event) -> Iterator[Seed]:
    """A process that seeds the folder; it ends with the block, and also if this process dies.

    Raises:
        MagnetarError: it does not start; the message has its own.
    """
    command = [sys.executable, "-m", "magnetar.cli", "seed", str(folder), "--store", str(store)]
    command += ["--stop-on-eof", "--output", "json", "--progress", "none"]
    with tempfile.TemporaryFile() as complaints:
        # In a session of its own: Ctrl-C on the terminal must not end it before its client.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            line = _first_line(process, stop)
            if not line:
                complaints.seek(0)
                said = complaints.read().decode(errors="replace").strip()
                raise MagnetarError(
                    f"the seed of the demo did not start: {said or 'no reason given'}"
                )
            told = json.loads(line)
            yield Seed(told["magnet"], told["address"])
        finally:
            _end(process)


def ask(url: str, model_name: str, *, api_key_file: str | None = None) -> str:
    """The model's answer to `QUESTION` over the API.

    Raises:
        MagnetarError: the API answers with an error or with nothing.
    """
    body = {
        "model": model_name,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 48,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    if api_key_file is not None:
        headers["Authorization"] = f"Bearer {Path(api_key_file).read_text().strip()}"
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers
    )
    # Proxies of the environment are for the internet, not for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_S) as response:
            reply = json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode(errors="replace")
        raise MagnetarError(f"the API answered {error.code}: {said}") from error
    except OSError as error:
        raise MagnetarError(f"the API at {url} does not answer: {error}") from error
    answer = str(reply["choices"][0]["message"]["content"]).strip()
    if not answer:
        raise MagnetarError(f"the model answered nothing: {json.dumps(reply)[:500]}")
    return answer


def _first_line(process: subprocess.Popen[bytes], stop: threading.Event) -> bytes:
    """What the process says first; empty if it ends without a word."""
    assert process.stdout is not None
    deadline = time.monotonic() + _SEED_START_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not selector.select(timeout=0.1):
            _raise_if(stop)
            if time.monotonic() > deadline:
                raise TimedOutError(f"the seed of the demo said nothing for {_SEED_START_S:g} s")
    return process.stdout.readline()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _raise_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise InterruptedByUserError("stopped; what was made and downloaded is kept")
