"""Our engine beside others, on one machine and in the same minutes.

    python benchmarks/engine.py --quick              under six minutes; no peer but transformers
    python benchmarks/engine.py --output FILE        every case, every peer that is installed
    python benchmarks/engine.py --case decode-1 --case prefill-512 --rounds 7

Each engine is a process of its own that loads the model once (`peers/`); then the engines take
turns, several rounds of them, so that whatever else the machine does falls on all alike. Rates are
medians of the rounds; a ratio is the median of the rounds' ratios. Peers are looked for in
``--peers DIR``, which `peers/install.sh` fills; one that is not there is left out. Prints a table
on stderr and one JSON object per case on stdout. FILE grows by a case at a time, and the same
command goes on where an earlier one ended.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from magnetar.benchmarks.cases import (
    FIRST_TOKEN,
    HOP,
    NAMES,
    OURS,
    PEERS,
    QUICK,
    RATES,
    SCHEDULER,
    SERVING_PEERS,
    STREAMED,
    Case,
    Engine,
)
from magnetar.benchmarks.clock import Clock
from magnetar.benchmarks.engine_process import (
    ANSWER_TIMEOUT_S,
    CACHE,
    HERE,
    Runner,
    command,
    model_folder,
)
from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.record import Record
from magnetar.benchmarks.synthetic import SHAPES
from magnetar.benchmarks.up import machine
from magnetar.benchmarks.verdict import table, verdict

ROUNDS, QUICK_ROUNDS = 5, 3
BYTES_PER_WEIGHT = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}

HOP_GOAL_MS = 0.3
HOP_STAGES = 3
FIRST_TOKEN_SHARE = 0.7
"""Arrivals of the case, over the lower of two capacities."""
FULL_REQUESTS, LOAD_REQUESTS = 16, 32


class Bench:
    """Engines that are loaded, and what they can be measured by."""

    def __init__(
        self, *, peers: Path, threads: int, rounds: int, wanted: Sequence[str], clock: Clock
    ) -> None:
        self._peers, self._threads, self._rounds = peers, threads, rounds
        self._programs = (OURS, *wanted)
        self._clock = clock
        self._runners: dict[Engine, Runner] = {}
        self._left_out: set[Engine] = set()
        """Peers that do not load: they are tried once."""

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        """Of the engines that are loaded."""
        return {engine.program: runner.versions for engine, runner in self._runners.items()}

    def run(self, case: Case) -> dict[str, Any]:
        """Every engine of the case in turn, round after round."""
        runners = self._loaded((case.ours, *case.others))
        rates: dict[str, list[float]] = {}
        walls: list[float] = []
        details: dict[str, Any] = {}
        task = self._clock.task(case.task)
        warm = replace(
            task,
            seed=-1,
            num_prompt=min(512, task.num_prompt),
            num_tokens=min(4, task.num_tokens),
        )
        for runner in list(runners):
            self._try(case.ours, runners, runner, warm)
        least, case_s = 1 if self._clock.quick else 2, self._clock.case_s()
        began = time.monotonic()
        for number in range(self._rounds):
            taken_s = time.monotonic() - began
            if number >= least and taken_s * (number + 1) / number > case_s:
                break
            shift = number % len(runners)
            for runner in runners[shift:] + runners[:shift]:
                answer = self._try(case.ours, runners, runner, replace(task, seed=number))
                label = runner.engine.label
                if answer is None:
                    rates.pop(label, None)
                    continue
                rates.setdefault(label, []).append(answer["rate"])
                details[label] = {key: answer[key] for key in ("busy", "experts") if key in answer}
            if case.at_wall:
                walls.append(_read_gbps(self._threads))
        ours = rates.pop(case.ours.label)
        if case.at_wall:
            active = SHAPES[case.ours.model].active_params() * BYTES_PER_WEIGHT[case.ours.dtype]
            rates["memory wall"] = [gbps * 1e9 / active for gbps in walls]
            details["read_gbps"] = round(statistics.median(walls), 1)
        return verdict(case, ours, rates) | {"details": details}

    def run_hop(self) -> dict[str, Any]:
        """What a further stage adds to the time of a token, on a model that hardly computes.

        A stage begins with cold caches whenever its turn comes, so that the same layers take longer
        in three processes than in one: ``details`` tells that part.
        """
        engines = [Engine(model="tiny", stages=n, threads=1) for n in (1, HOP_STAGES)]
        runners = self._loaded(engines)
        task = Task(kind="decode", num_tokens=200)
        added_ms, computing_ms = [], []
        for number in range(self._rounds):
            answers = [runner.measure(replace(task, seed=number)) for runner in runners]
            gaps = [answer["gap_p50_s"] for answer in answers]
            busy = [sum(answer["busy"]) / answer["rate"] for answer in answers]
            added_ms.append((gaps[1] - gaps[0]) / (HOP_STAGES - 1) * 1e3)
            computing_ms.append((busy[1] - busy[0]) / (HOP_STAGES - 1) * 1e3)
        ours = statistics.median(added_ms)
        return {
            "case": HOP,
            "ours": round(ours, 3),
            "unit": "ms a stage, p50",
            "best_peer": None,
            "ratio": round(ours / HOP_GOAL_MS, 3),
            "goal": f"<= {HOP_GOAL_MS:g} ms",
            "holds": ours <= HOP_GOAL_MS,
            "details": {"of it computing_ms": round(statistics.median(computing_ms), 3)},
        }

    def run_first_token(self) -> dict[str, Any]:
        """Seconds from arrival to first token, p99, ours beside those of the best serving peer.

        How many requests a second an engine serves when all are there at once is its capacity; the
        best peer is the one with most. Then both serve the same arrivals, at `FIRST_TOKEN_SHARE` of
        the lower capacity of the two.
        """
        ours = Engine()
        runners = self._loaded([replace(ours, program=name) for name in (OURS, *SERVING_PEERS)])
        full = Task(kind="load", num_requests=FULL_REQUESTS, seed=1)
        capacities: dict[str, float] = {}
        for runner in list(runners):
            if self._try(ours, runners, runner, replace(full, num_requests=4, seed=0)) is None:
                continue
            answer = self._try(ours, runners, runner, full)
            if answer is not None:
                capacities[runner.engine.label] = FULL_REQUESTS / answer["seconds"]
        peers = [runner for runner in runners if runner.engine != ours]
        if not peers:
            return {"case": FIRST_TOKEN, "skipped": "no peer that serves runs here"}
        best = max(peers, key=lambda runner: capacities[runner.engine.label])
        both = [self._runners[ours], best]
        rate = FIRST_TOKEN_SHARE * min(capacities[runner.engine.label] for runner in both)
        load = Task(kind="load", num_requests=LOAD_REQUESTS, rate=rate, seed=2)
        seconds = [sorted(runner.measure(load)["first_token_s"]) for runner in both]
        p99 = [statistics.quantiles(of, n=100, method="inclusive")[98] for of in seconds]
        return {
            "case": FIRST_TOKEN,
            "ours": round(p99[0], 3),
            "unit": "s, p99 under load",
            "best_peer": best.engine.label,
            "reference": round(p99[1], 3),
            "ratio": round(p99[0] / p99[1], 3),
            "goal": "<= 1",
            "holds": p99[0] <= p99[1],
            "details": {
                "requests_per_s": round(rate, 3),
                "capacities": {label: round(of, 3) for label, of in capacities.items()},
                "p50": [round(statistics.median(of), 3) for of in seconds],
            },
        }

    def close(self) -> None:
        """End all engines."""
        self._loaded([])

    def _loaded(self, engines: Sequence[Engine]) -> list[Runner]:
        """Load what is missing and end what is not asked for: memory holds four models or so.

        Peers that do not run here are left out.

        Raises:
            RuntimeError: ours, the first, does not run.
        """
        engines = [engine for engine in engines if engine.program in self._programs]
        for engine in [engine for engine in self._runners if engine not in engines]:
            self._runners.pop(engine).close()
        for engine in engines:
            if engine in self._runners or engine in self._left_out:
                continue
            try:
                start = command(engine, peers=self._peers, threads=self._threads)
                runner = Runner(engine, start).loaded()
            except (FileNotFoundError, RuntimeError, subprocess.CalledProcessError) as error:
                if engine.program == OURS:
                    raise RuntimeError(str(error)) from error
                print(f"left out: {error}", file=sys.stderr)
                self._left_out.add(engine)
                continue
            self._runners[engine] = runner
        return [self._runners[engine] for engine in engines if engine in self._runners]

    def _try(
        self, ours: Engine, runners: list[Runner], runner: Runner, task: Task
    ) -> dict[str, Any] | None:
        """The answer; None, and the runner is out of the case, when it is a peer that fails."""
        try:
            return runner.measure(task)
        except (RuntimeError, OSError) as error:
            self._runners.pop(runner.engine).close()
            if runner.engine == ours:
                raise
            print(f"left out: {error}", file=sys.stderr)
            runners.remove(runner)
            return None


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


def run_script(name: str, judged: str, *options: str) -> dict[str, Any]:
    """A case that is a benchmark of its own: its line of the name that begins like `judged`."""
    command = [sys.executable, str(HERE / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    found = next(line for line in lines if line["case"].startswith(judged) and "holds" in line)
    details = {line["case"]: line["ours"] for line in lines if line is not found}
    return found | {"best_peer": None, "unit": found["case"], "details": details}


def main() -> None:
    """Measures, judges, prints; a case that fails is told and leaves the others alone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, one peer")
    parser.add_argument("--case", action="append", choices=NAMES, help="only these")
    parser.add_argument("--peer", action="append", choices=PEERS, help="only these (all)")
    parser.add_argument("--peers", type=Path, default=CACHE / "peers", metavar="DIR")
    parser.add_argument("--rounds", type=int, metavar="N", help="at most so many")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="keep each result there; cases that are there already are not measured again",
    )
    args = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        record = Record(args.output, machine() | {"threads": args.threads, "quick": args.quick})
    except ValueError as error:
        parser.error(str(error))
    wanted = args.case or (QUICK if args.quick else NAMES)
    names = [name for name in wanted if name not in record.results]
    for case in RATES:
        if case.name in names:
            model_folder(case.ours.model)  # made now, not in the time of its first case
    clock = Clock(len(names), quick=args.quick)
    bench = Bench(
        peers=args.peers,
        threads=args.threads,
        rounds=args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS),
        wanted=args.peer or (("transformers",) if args.quick else PEERS),
        clock=clock,
    )
    runs = _runs(bench, clock)
    failed: dict[str, dict[str, Any]] = {}
    try:
        for name in names:
            began = time.monotonic()
            try:
                result = runs[name]() if clock.begin() else {"skipped": "no time was left for it"}
            except Exception as error:
                traceback.print_exc()
                result = {"skipped": f"failed: {error}"}
            result |= {
                "case": name,
                "took_s": round(time.monotonic() - began),
                "load": round(os.getloadavg()[0], 2),
                "engines": bench.versions,
            }
            print(json.dumps(result), flush=True)
            record.add(result)
            if "skipped" in result:
                failed[name] = result
    finally:
        bench.close()
        found = failed | record.results
        print(table([found[name] for name in wanted if name in found]), file=sys.stderr)


def _runs(bench: Bench, clock: Clock) -> dict[str, Callable[[], dict[str, Any]]]:
    """What measures each case."""
    rounds = ("--rounds", "1") if clock.quick else ()
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        case.name: partial(bench.run, case) for case in RATES
    }
    return runs | {
        HOP: bench.run_hop,
        FIRST_TOKEN: bench.run_first_token,
        SCHEDULER: partial(run_script, "scheduler.py", "schedule, 64 requests, 1 stages"),
        STREAMED: partial(run_script, "streaming.py", "CPU of a streamed token", *rounds),
    }


if __name__ == "__main__":
    main()
