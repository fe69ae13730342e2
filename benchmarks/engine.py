"""Our engine beside others, on one machine and in the same minutes.

    python benchmarks/engine.py --quick            under six minutes; no peer but transformers
    python benchmarks/engine.py                    every case, every peer that is installed
    python benchmarks/engine.py --case decode-1 --case prefill-512 --rounds 7

Each engine is a process of its own that loads the model once (`peers/`); then the engines take
turns, several rounds of them, so that whatever else the machine does falls on all alike. Rates are
medians of the rounds; a ratio is the median of the rounds' ratios. Peers are looked for in
``--peers DIR``, which `peers/install.sh` fills; one that is not there is left out. Prints a table
on stderr and one JSON object per case on stdout.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.synthetic import SHAPES, write_model
from magnetar.benchmarks.up import machine

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "magnetar-benchmarks"
ROUNDS = 5
BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
OURS = "magnetar"
PEERS = ("transformers", "llama", "vllm")
ANSWER_TIMEOUT_S = 300.0
"""For loading, or for one task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """A way to run a model: whose program, and how."""

    program: str = OURS
    model: str = "moe"
    dtype: str = "bf16"
    stages: int = 1

    @property
    def label(self) -> str:
        """For tables."""
        words = [self.program, self.model, self.dtype]
        return "/".join([*words, f"{self.stages}-stages"] if self.stages > 1 else words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One comparison: `ours` against the best of `others`, or against the memory wall."""

    name: str
    ours: Engine
    others: tuple[Engine, ...]
    task: Task
    goal: float
    at_wall: bool = False
    """Compare with read bandwidth over active bytes instead."""


def _beside_peers(ours: Engine) -> tuple[Engine, ...]:
    """The same model in the same width by everybody else."""
    programs = PEERS if ours.dtype == "bf16" else ("llama",)
    return tuple(replace(ours, program=program) for program in programs)


def _decode(num_streams: int, num_tokens: int, **changes: Any) -> Task:
    return Task(kind="decode", num_streams=num_streams, num_tokens=num_tokens, **changes)


BF16 = Engine()
SMOL = Engine(model="demo")
CASES = (
    Case(name="decode-1", ours=BF16, others=_beside_peers(BF16), task=_decode(1, 32), goal=1.0),
    Case(name="decode-1-wall", ours=BF16, others=(), task=_decode(1, 32), goal=0.85, at_wall=True),
    Case(name="decode-8", ours=BF16, others=_beside_peers(BF16), task=_decode(8, 16), goal=1.0),
    Case(name="decode-32", ours=BF16, others=_beside_peers(BF16), task=_decode(32, 12), goal=1.5),
    Case(
        name="prefill-512",
        ours=BF16,
        others=_beside_peers(BF16),
        task=Task(kind="prefill", num_prompt=512),
        goal=1.2,
    ),
    Case(
        name="prefill-4096",
        ours=BF16,
        others=_beside_peers(BF16),
        task=Task(kind="prefill", num_prompt=4096),
        goal=1.2,
    ),
    Case(
        name="demo-decode-1", ours=SMOL, others=_beside_peers(SMOL), task=_decode(1, 32), goal=1.0
    ),
    Case(
        name="demo-decode-8", ours=SMOL, others=_beside_peers(SMOL), task=_decode(8, 16), goal=1.0
    ),
    *(
        Case(
            name=f"stages-{stages}",
            ours=Engine(stages=stages),
            others=(BF16,),
            task=_decode(16, 16),
            goal=0.95,
        )
        for stages in (2, 4)
    ),
    *(
        case
        for dtype, gain in (("int8", 1.7), ("int4", 2.8))
        for case in (
            Case(
                name=f"{dtype}-over-bf16",
                ours=Engine(dtype=dtype),
                others=(BF16,),
                task=_decode(1, 32),
                goal=gain,
            ),
            Case(
                name=f"{dtype}-decode-1",
                ours=Engine(dtype=dtype),
                others=_beside_peers(Engine(dtype=dtype)),
                task=_decode(1, 32),
                goal=1.0,
            ),
        )
    ),
    Case(
        name="sparse-pays",
        ours=BF16,
        others=(Engine(model="dense"),),
        task=_decode(1, 16),
        goal=5.0,
    ),
)
QUICK = ("decode-1", "decode-1-wall", "decode-8", "decode-32", "prefill-512")


HOP = "hop"
HOP_GOAL_MS = 0.3
HOP_STAGES = 3


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


class Bench:
    """Engines that are loaded, and everything measured so far."""

    def __init__(self, *, peers: Path, threads: int, rounds: int, wanted: Sequence[str]) -> None:
        self._peers, self._threads, self._rounds = peers, threads, rounds
        self._programs = (OURS, *wanted)
        self._runners: dict[Engine, Runner] = {}
        self._read_gbps: list[float] = []
        self.versions: dict[str, dict[str, str]] = {}

    def run(self, case: Case) -> dict[str, Any]:
        """Every engine of the case in turn, round after round."""
        engines = [e for e in (case.ours, *case.others) if e.program in self._programs]
        self._keep(engines)
        runners = [self._runners[engine] for engine in engines if engine in self._runners]
        if case.ours not in self._runners:
            return {"case": case.name, "skipped": f"{case.ours.label} does not run here"}
        rates: dict[str, list[float]] = {runner.engine.label: [] for runner in runners}
        walls: list[float] = []
        details: dict[str, Any] = {}
        warm = replace(
            case.task,
            seed=-1,
            num_prompt=min(512, case.task.num_prompt),
            num_tokens=min(4, case.task.num_tokens),
        )
        for runner in list(runners):
            try:
                runner.measure(warm)
            except RuntimeError as error:  # a peer that cannot do it is left out of this case
                if runner.engine == case.ours:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                runners.remove(runner)
                rates.pop(runner.engine.label)
                self._runners.pop(runner.engine).close()
        for number in range(self._rounds):
            shift = number % len(runners)
            for runner in runners[shift:] + runners[:shift]:
                answer = runner.measure(replace(case.task, seed=number))
                rates[runner.engine.label].append(answer["rate"])
                details[runner.engine.label] = {
                    key: answer[key] for key in ("busy", "experts") if key in answer
                }
            if case.at_wall:
                walls.append(_read_gbps(self._threads))
        ours = rates.pop(case.ours.label)
        if case.at_wall:
            active = SHAPES[case.ours.model].active_params() * BYTES_PER_WEIGHT[case.ours.dtype]
            rates["memory wall"] = [gbps * 1e9 / active for gbps in walls]
            details["read_gbps"] = round(statistics.median(walls), 1)
        return _verdict(case, ours, rates) | {"details": details}

    def run_hop(self) -> dict[str, Any]:
        """What a further stage adds to the time of a token, on a model that hardly computes."""
        engines = [Engine(model="tiny"), Engine(model="tiny", stages=HOP_STAGES)]
        self._keep(engines)
        one, several = (self._runners[engine] for engine in engines)
        task = _decode(1, 200)
        added_ms = []
        for number in range(self._rounds):
            gaps = [r.measure(replace(task, seed=number))["gap_p50_s"] for r in (one, several)]
            added_ms.append((gaps[1] - gaps[0]) / (HOP_STAGES - 1) * 1e3)
        ours = statistics.median(added_ms)
        return {
            "case": HOP,
            "ours": round(ours, 3),
            "unit": "ms a stage, p50",
            "reference": None,
            "ratio": None,
            "goal": HOP_GOAL_MS,
            "holds": ours <= HOP_GOAL_MS,
        }

    def close(self) -> None:
        """End all engines."""
        self._keep([])

    def _keep(self, engines: Sequence[Engine]) -> None:
        """Load what is missing and end what is not asked for: memory holds three models or so."""
        for engine in [engine for engine in self._runners if engine not in engines]:
            self._runners.pop(engine).close()
        for engine in engines:
            if engine in self._runners:
                continue
            try:
                runner = Runner(engine, self._command(engine)).loaded()
            except (FileNotFoundError, RuntimeError, subprocess.CalledProcessError) as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            self._runners[engine] = runner
            self.versions[engine.program] = runner.versions

    def _command(self, engine: Engine) -> list[str]:
        folder = model_folder(engine.model)
        script = HERE / "peers" / f"{engine.program}_runner.py"
        python = sys.executable
        if engine.program != OURS:
            python = str(self._peers / engine.program / "bin" / "python")
            if not Path(python).exists():
                raise FileNotFoundError(f"{engine.program} is not in {self._peers}")
        arguments = [str(folder), "--threads", str(self._threads)]
        if engine.program == OURS:
            arguments += ["--stages", str(engine.stages), "--dtype", engine.dtype]
        if engine.program == "llama":
            bf16 = folder.with_suffix(".gguf")
            if not bf16.exists():
                # In our environment: it reads releases as we do.
                copy = [sys.executable, str(HERE / "peers" / "gguf_copy.py")]
                subprocess.run([*copy, str(folder), str(bf16)], check=True, stdout=sys.stderr)
            arguments = [str(bf16), "--threads", str(self._threads), "--dtype", engine.dtype]
        return [python, str(script), *arguments]


def _verdict(case: Case, ours: Sequence[float], rates: dict[str, list[float]]) -> dict[str, Any]:
    """The object that is printed."""
    result: dict[str, Any] = {"case": case.name, "ours": round(statistics.median(ours), 2)}
    if not rates:
        return result | {"reference": None, "ratio": None, "goal": case.goal, "holds": None}
    best = max(rates, key=lambda label: statistics.median(rates[label]))
    ratio = statistics.median(a / b for a, b in zip(ours, rates[best], strict=True))
    return result | {
        "best_peer": best,
        "reference": round(statistics.median(rates[best]), 2),
        "ratio": round(ratio, 3),
        "goal": case.goal,
        "holds": ratio >= case.goal,
        "rates": {label: round(statistics.median(of), 2) for label, of in rates.items()},
        "spread": [round(min(ours), 2), round(max(ours), 2)],
    }


def _read_gbps(threads: int) -> float:
    """How fast memory is read by a plain sum; the best of some, as it is a property."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(1 << 28)
    best_s = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        values.sum()
        best_s = min(best_s, time.perf_counter() - began)
    return values.nbytes / best_s / 1e9


def model_folder(name: str) -> Path:
    """The release of a model, made if it is not there."""
    if name != "demo":
        return write_model(CACHE / name, SHAPES[name])
    from magnetar.fetcher.demo.build import build_demo_release

    return build_demo_release(CACHE / name)


def _package_link() -> Path:
    """A folder where ``magnetar`` is this repository, for interpreters that do not have it."""
    links = CACHE / "links"
    links.mkdir(parents=True, exist_ok=True)
    link = links / "magnetar"
    if link.is_symlink() and link.readlink() != HERE.parent:
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(HERE.parent)
    return links


def table(results: Sequence[dict[str, Any]]) -> str:
    """The verdicts as people read them."""
    rows = [f"{'case':<16} {'ours':>8} {'other':>8} {'ratio':>6} {'goal':>5}  holds  against"]
    for result in results:
        if result.get("ratio") is None:
            said = result.get("skipped") or f"{result['ours']:8.2f} {result.get('unit', '')}"
            rows.append(f"{result['case']:<16} {said}")
            continue
        others = ", ".join(f"{label} {rate:g}" for label, rate in result["rates"].items())
        rows.append(
            f"{result['case']:<16} {result['ours']:8.2f} {result['reference']:8.2f} "
            f"{result['ratio']:6.2f} {result['goal']:5.2f}  {'yes' if result['holds'] else 'no':<5}"
            f"  {others}"
        )
    return "\n".join(rows)


def main() -> None:
    """Measures, judges, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, one peer")
    parser.add_argument(
        "--case", action="append", choices=[*(case.name for case in CASES), HOP], help="only these"
    )
    parser.add_argument("--peer", action="append", choices=PEERS, help="only these (all)")
    parser.add_argument("--peers", type=Path, default=CACHE / "peers", metavar="DIR")
    parser.add_argument("--rounds", type=int, metavar="N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    wanted = args.case or (QUICK if args.quick else [*(case.name for case in CASES), HOP])
    about = machine() | {"threads": args.threads, "quick": args.quick}
    bench = Bench(
        peers=args.peers,
        threads=args.threads,
        rounds=args.rounds or (3 if args.quick else ROUNDS),
        wanted=args.peer or (("transformers",) if args.quick else PEERS),
    )
    by_name = {case.name: case for case in CASES}
    results = []
    try:
        for name in wanted:
            results.append(bench.run_hop() if name == HOP else bench.run(by_name[name]))
            print(json.dumps(results[-1]), flush=True)
    finally:
        bench.close()
    print(table(results), file=sys.stderr)
    if args.output:
        about |= {"engines": bench.versions, "load_after": round(os.getloadavg()[0], 2)}
        lines = [json.dumps(row) for row in (about, *results)]
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
