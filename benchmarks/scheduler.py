"""The cost of deciding: microseconds that the scheduler and the messages of its steps take.

    python benchmarks/scheduler.py

Synchronous, in one process, no model. Prints a JSON object per case; with ``--output FILE`` they
are kept after a first object that describes the machine. A reading is the median over steps in
which every running request decodes one token.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

from magnetar.serve.engine.request import GenerationParams, Request
from magnetar.serve.engine.scheduler import Scheduler
from magnetar.serve.engine.step import Sample, StepPlan, StepResult
from magnetar.serve.engine.step_codec import Known, decode_plan, encode_plan

NUM_REQUESTS = 64
GOAL_US = 100.0


def run(num_stages: int, num_steps: int) -> dict[str, float]:
    """Medians in microseconds by what is done."""
    scheduler = Scheduler(
        num_kv_blocks=NUM_REQUESTS * 512,
        max_context_tokens=8192,
        max_running=NUM_REQUESTS,
        num_stages=num_stages,
    )
    params = GenerationParams(max_tokens=8000, ignore_eos=True)
    for request_id in range(NUM_REQUESTS):
        prompt_ids = tuple((request_id * 31 + index * 7) % 999 for index in range(100))
        scheduler.add(Request(request_id=request_id, prompt_ids=prompt_ids, params=params))
    readings: dict[str, list[float]] = {}

    def note(name: str, start: float, end: float | None = None) -> None:
        took = (end or time.perf_counter()) - start
        readings.setdefault(name, []).append(took * 1e6)

    belt: deque[StepPlan] = deque()
    ours: Known = {}
    theirs: Known = {}
    while len(readings.get("complete", ())) < num_steps:
        while True:
            start = time.perf_counter()
            plan = scheduler.schedule()
            end = time.perf_counter()
            if plan is None:
                break
            if plan.num_tokens == len(plan.rows):
                note("schedule", start, end)
            start = time.perf_counter()
            body = encode_plan(plan, ours)
            note("write the plan", start)
            start = time.perf_counter()
            decode_plan(plan.step_id, body, theirs)
            note("read the plan", start)
            belt.append(plan)
        plan = belt.popleft()
        samples = tuple(
            Sample(request_id=row.request_id, token_id=5)
            for row in plan.rows
            if row.sampling is not None
        )
        result = StepResult(step_id=plan.step_id, samples=samples)
        start = time.perf_counter()
        scheduler.complete(result)
        note("complete", start)
    return {name: statistics.median(times) for name, times in readings.items()}


def rows(num_steps: int) -> list[dict[str, Any]]:
    """One object per case; only deciding has a goal."""
    found = []
    for num_stages in (1, 2, 4):
        for name, ours in run(num_stages, num_steps).items():
            case = f"{name}, {NUM_REQUESTS} requests, {num_stages} stages, us"
            line: dict[str, Any] = {"case": case, "ours": round(ours, 1)}
            if name == "schedule":
                line |= {"ratio": round(ours / GOAL_US, 3), "goal": f"<= {GOAL_US:g} us"}
                line["holds"] = ours <= GOAL_US
            found.append(line)
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="measured steps of each case")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    given = parser.parse_args()
    lines = [json.dumps(line) for line in [machine(), *rows(given.steps)]]
    print("\n".join(lines[1:]))
    if given.output is not None:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
