"""Times the life of the demo, from nothing to tokens, by running the real command.

    python benchmarks/up.py            a fresh store, then once more with everything in it
    python benchmarks/up.py --quick    a fresh store only, and few tokens

The command is ``magnetar demo``: it makes the model, seeds it from another process and then does
what ``magnetar up MAGNET`` does. Phases are timed from outside, by when their last reading arrives,
so that they add up to the time a user waits. Prints a table on stderr and one JSON object per
phase on stdout; nothing is kept unless ``--output FILE`` says where.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROMPT = "<|im_start|>user\nTell me about the sea.<|im_end|>\n<|im_start|>assistant\n"
PACKAGES = ("magnetar", "torch", "ray", "libtorrent", "gguf")
READY_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
SEEDING = "seeding "
"""How the note begins that the command says when its seed stands."""
# The proxies of the environment are for the internet, not for this machine.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One phase of one run."""

    run: str
    phase: str
    seconds: float
    """Since the phase before it ended."""
    num_bytes: int = 0
    num_tokens: int = 0
    concurrency: int = 0

    @property
    def rate(self) -> str:
        """Bytes or tokens per second, for people; nothing where all was there already."""
        if self.seconds < 0.01 or not (self.num_bytes or self.num_tokens):
            return ""
        if self.num_tokens:
            return f"{self.num_tokens / self.seconds:.1f} tokens/s"
        return f"{self.num_bytes / self.seconds / 1e6:.0f} MB/s"


class Run:
    """One ``magnetar demo`` over a store, and what its readings say about time."""

    def __init__(self, name: str, store: Path, arguments: list[str]) -> None:
        self.name = name
        self.timings: list[Timing] = []
        command = [sys.executable, "-m", "magnetar.cli", "demo", "--progress", "json"]
        command += ["--store", str(store), "--port", "0", *arguments]
        environment = os.environ | {"MAGNETAR_HOME": str(store / "home")}
        self._last_s = time.monotonic()
        self._said: list[str] = []
        self._ended: set[str] = set()
        self._ready = threading.Event()
        self._endpoint: tuple[str, str] | None = None
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that Ctrl-C here lets us end it in order
        )
        self._reader = threading.Thread(target=self._read, name="readings", daemon=True)
        self._reader.start()

    def until_ready(self) -> tuple[str, str]:
        """The URL and the name of the model, as soon as it serves."""
        if not self._ready.wait(READY_TIMEOUT_S) or self._endpoint is None:
            last = "\n".join(self._said[-20:])
            raise SystemExit(f"the demo did not come up; it said last:\n{last}")
        return self._endpoint

    def stop(self) -> None:
        """End the command as Ctrl-C does, and take its time."""
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise SystemExit(f"the demo did not stop within {STOP_TIMEOUT_S:.0f} s") from None
        finally:
            self._reader.join(STOP_TIMEOUT_S)
        self.add("stop", time.monotonic() - began)

    def add(self, phase: str, seconds: float, **amounts: int) -> None:
        """Note a phase that was timed elsewhere."""
        self.timings.append(Timing(run=self.name, phase=phase, seconds=seconds, **amounts))

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._said.append(line.rstrip())
                with contextlib.suppress(json.JSONDecodeError):
                    self._observe(json.loads(line))
        self._ready.set()  # also when it failed: then without an endpoint

    def _observe(self, event: dict[str, Any]) -> None:
        if not self._said[1:]:
            self._end("start")
        kind = event.get("event")
        if kind == "note" and str(event["message"]).startswith(SEEDING):
            self._end("seed")
        elif kind == "progress" and event["finished"] and event["phase"] not in self._ended:
            moves = event["phase"] in ("build", "download", "load")
            self._end(event["phase"], num_bytes=event["total_bytes"] if moves else 0)
        elif kind == "ready":
            self._endpoint = (event["url"], event["model"])
            self._ready.set()

    def _end(self, phase: str, **amounts: int) -> None:
        now = time.monotonic()
        self._ended.add(phase)
        self.add(phase, now - self._last_s, **amounts)
        self._last_s = now


def stream(url: str, model: str, num_tokens: int) -> tuple[float, float]:
    """Seconds to the first token of an answer, and from there to the last."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    began = time.monotonic()
    first = last = None
    with OPENER.open(request, timeout=ANSWER_TIMEOUT_S) as response:
        for line in response:
            if line.startswith(b"data: {"):
                last = time.monotonic()
                first = first or last
    if first is None or last is None:
        raise SystemExit("the API answered without a token")
    return first - began, last - first


def measure_tokens(run: Run, *, num_tokens: int, concurrencies: tuple[int, ...]) -> None:
    """Adds the first token of an idle server and decoding, alone and together."""
    url, model = run.until_ready()
    first_s, decode_s = stream(url, model, num_tokens)
    run.add("first token", first_s)
    run.add("decode", decode_s, num_tokens=num_tokens - 1, concurrency=1)
    for concurrency in concurrencies:
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            answers = [pool.submit(stream, url, model, num_tokens) for _ in range(concurrency)]
            for answer in answers:
                answer.result()
        seconds = time.monotonic() - began
        run.add("answers", seconds, num_tokens=num_tokens * concurrency, concurrency=concurrency)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import psutil

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table(timings: list[Timing]) -> str:
    """The phases as people read them."""
    rows = [f"{'run':<8} {'phase':<12} {'seconds':>8}  rate"]
    for timing in timings:
        phase = timing.phase + (f" x{timing.concurrency}" if timing.concurrency > 1 else "")
        rows.append(f"{timing.run:<8} {phase:<12} {timing.seconds:8.2f}  {timing.rate}".rstrip())
    return "\n".join(rows)


@contextlib.contextmanager
def fresh_store(parent: Path | None) -> Iterator[Path]:
    """A folder for the release, its copy and all records; 3 GB that are gone afterwards."""
    store = Path(tempfile.mkdtemp(prefix="magnetar-benchmark-", dir=parent))
    try:
        yield store
    finally:
        shutil.rmtree(store, ignore_errors=True)


def main() -> None:
    """Runs the demo once or twice and says how long everything took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one run, few tokens")
    parser.add_argument("--stages", type=int, metavar="N", help="parts to split the layers into")
    parser.add_argument("--dtype", help="number format to compute in (as stored)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where 3 GB may lie meanwhile")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    args = parser.parse_args()
    arguments = ["--stages", str(args.stages)] if args.stages else []
    arguments += ["--dtype", args.dtype] if args.dtype else []
    about = machine() | {"arguments": arguments, "quick": args.quick}
    timings: list[Timing] = []
    with fresh_store(args.scratch) as store:
        for name in ("fresh",) if args.quick else ("fresh", "again"):
            run = Run(name, store, arguments)
            try:
                measure_tokens(
                    run,
                    num_tokens=16 if args.quick else 128,
                    concurrencies=() if args.quick else (4, 8),
                )
            finally:
                run.stop()
            timings += run.timings
    print(table(timings), file=sys.stderr)
    lines = [json.dumps(row) for row in (about, *(_rounded(timing) for timing in timings))]
    print("\n".join(lines[1:]))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rounded(timing: Timing) -> dict[str, Any]:
    kept = {key: value for key, value in asdict(timing).items() if value or key == "seconds"}
    return kept | {"seconds": round(timing.seconds, 3)}


if __name__ == "__main__":
    main()
