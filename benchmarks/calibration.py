"""Predicted step times beside measured ones, for one stream through 1, 2 and 4 stages.

    python benchmarks/calibration.py                  the demo model and the synthetic Mixtral
    python benchmarks/calibration.py --quick          the demo model alone

The machine is measured as `magnetar nodes` does, the plan is made as `magnetar plan --stages N`
makes it, and the engine then decodes as deployed: a process a stage, joined by links. Prints a
table on stderr and one JSON object per case on stdout; a ratio is predicted over measured.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from magnetar.benchmarks.cases import Engine
from magnetar.benchmarks.engine_process import Runner, command, model_folder
from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.up import machine
from magnetar.cluster.inventory.inventory import probe_node
from magnetar.cluster.inventory.measure import measure_speeds
from magnetar.cluster.plan import Inventory, Node, Workload
from magnetar.cluster.planning.planner import plan
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.config import ReleaseHints
from magnetar.serve.gauge import ModelGauge

STAGES = (1, 2, 4)
GOAL = 0.2
"""Share of the measured time by which a prediction may be off."""
NUM_TOKENS = 32
CONTEXT_TOKENS = 64
"""About what a task has in use; the planner counts half of it."""


def predicted_s(folder: Path, node: Node, num_stages: int, dtype: str) -> float:
    """One step around all stages, as the planner says."""
    facts = read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())
    workload = Workload(
        max_context_tokens=CONTEXT_TOKENS,
        max_concurrency=1,
        num_stages=num_stages,
        dtype=dtype,  # type: ignore[arg-type]
        objective="latency",
    )
    found = plan(facts.config, facts.index, Inventory(nodes=(node,)), workload)
    assert found.prediction is not None
    return found.prediction.round_trip_s


def measured_s(engine: Engine, num_threads: int, rounds: int) -> float:
    """The median time between two tokens of one stream."""
    runner = Runner(engine, command(engine, peers=Path(), threads=num_threads))
    try:
        runner.loaded()
        task = Task(kind="decode", num_streams=1, num_tokens=NUM_TOKENS)
        runner.measure(task)
        gaps: list[float] = [runner.measure(task)["gap_p50_s"] for _ in range(rounds)]
        return statistics.median(gaps)
    finally:
        runner.close()


def main() -> None:
    """Measures, predicts, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the demo model alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="keep the objects in a new file")
    args = parser.parse_args()
    described = machine() | {"benchmark": "calibration"}
    node = probe_node("here", "127.0.0.1", Path.home())
    node = measure_speeds(node, ModelGauge(), again=True)
    results: list[dict[str, Any]] = []
    print(f"{'case':<18} {'predicted':>10} {'measured':>10} {'ratio':>6}  holds", file=sys.stderr)
    for model in ("demo",) if args.quick else ("demo", "moe"):
        folder = model_folder(model)
        for num_stages in STAGES:
            engine = Engine(model=model, stages=num_stages)
            told = predicted_s(folder, node, num_stages, engine.dtype) * 1e3
            seen = measured_s(engine, node.num_cpus, args.rounds) * 1e3
            results.append(
                {
                    "case": f"{model}-{num_stages}-stages",
                    "ours": round(told, 2),
                    "reference": round(seen, 2),
                    "unit": "ms a step",
                    "ratio": round(told / seen, 3),
                    "goal": GOAL,
                    "holds": abs(told / seen - 1) <= GOAL,
                }
            )
            print(json.dumps(results[-1]), flush=True)
            print(
                f"{results[-1]['case']:<18} {told:10.2f} {seen:10.2f} {told / seen:6.2f}"
                f"  {'yes' if results[-1]['holds'] else 'no'}",
                file=sys.stderr,
            )
    if args.output:
        lines = [json.dumps(each) for each in (described, *results)]
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
