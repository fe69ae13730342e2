"""Predicted step times beside measured ones: 1, 2 and 4 stages, and experts in a helper.

    python benchmarks/calibration.py                  the demo model, the synthetic Mixtral, helpers
    python benchmarks/calibration.py --case demo      one of the three
    python benchmarks/calibration.py --quick          the demo model alone

The machine is measured as `magnetar nodes` does, the plan is made as `magnetar plan --stages N`
makes it, and the engine then decodes as deployed: a process a stage, joined by links. Helpers are
those of `spread.py`, with one thread each. Prints a table on stderr and one JSON object per case on
stdout; a ratio is predicted over measured.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from magnetar.benchmarks import spread
from magnetar.benchmarks.cases import Engine
from magnetar.benchmarks.engine_process import Runner, command, model_folder
from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.synthetic import write_model
from magnetar.benchmarks.up import machine
from magnetar.cluster.inventory.inventory import probe_node
from magnetar.cluster.inventory.link_probe import probe_itself
from magnetar.cluster.inventory.measure import measure_speeds
from magnetar.cluster.plan import Inventory, Link, Node, Workload
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.cost import (
    attention_s,
    device_speed,
    embeddings_s,
    model_cost,
    output_s,
)
from magnetar.cluster.search.expert_cost import Seat, hosts_s
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.config import ReleaseHints
from magnetar.serve.gauge import ModelGauge

CASES = ("demo", "moe", "spread")
STAGES = (1, 2, 4)
GOAL = 0.2
"""Share of the measured time by which a prediction may be off."""
NUM_TOKENS = 32
CONTEXT_TOKENS = 64
"""About what a task has in use; the planner counts half of it."""


def predicted_s(folder: Path, node: Node, link: Link, num_stages: int, dtype: str) -> float:
    """One step around all stages, as the planner says."""
    facts = read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())
    workload = Workload(
        max_context_tokens=CONTEXT_TOKENS,
        max_concurrency=1,
        num_stages=num_stages,
        dtype=dtype,  # type: ignore[arg-type]
        objective="latency",
    )
    inventory = Inventory(nodes=(node,), links=(link,))
    found = plan(facts.config, facts.index, inventory, workload)
    assert found.prediction is not None
    return found.prediction.round_trip_s


def measured_s(engine: Engine, num_threads: int, rounds: int) -> float:
    """The median time between two tokens of one stream, of the best round: what else runs makes
    rounds longer, never shorter, and the gauge takes the best of its runs too."""
    runner = Runner(engine, command(engine, peers=Path(), threads=num_threads))
    try:
        runner.loaded()
        task = Task(kind="decode", num_streams=1, num_tokens=NUM_TOKENS)
        runner.measure(task)
        gaps: list[float] = [runner.measure(task)["gap_p50_s"] for _ in range(rounds)]
        return min(gaps)
    finally:
        runner.close()


def spread_predictions(node: Node, link: Link, num_rows: int) -> dict[str, float]:
    """A step of the model of `spread.py` by where its experts are, as the cost model has it."""
    config, source = spread.release()
    cost = model_cost(config, source.index, "bf16")
    speed = device_speed(node.devices[0], "bf16")
    assert speed is not None
    seats = [Seat(speed=speed), Seat(speed=speed, link=link)]
    around = embeddings_s(cost, speed, tokens=num_rows) + output_s(cost, speed, tokens=num_rows)
    attention = attention_s(cost, 0, speed, tokens=num_rows, context_tokens=CONTEXT_TOKENS)
    found = {}
    for name, here in {"alone": range(config.num_experts), **spread.HERE}.items():
        held_OHE = np.zeros((1, 2, config.num_experts), dtype=np.int64)
        held_OHE[0, 0, list(here)] = 1
        held_OHE[0, 1] = 1 - held_OHE[0, 0]
        experts = float(hosts_s(cost, 0, seats, held_OHE, tokens=num_rows)[0])
        found[name] = around + config.n_layers * (attention + experts)
    return found


def calibrate_spread(link: Link, rounds: int) -> Iterator[dict[str, Any]]:
    """Stages of one thread without a helper, and with one that has all or half of the experts."""
    torch.set_num_threads(1)
    write_model(spread.FOLDER, spread.SHAPE)
    helpers = {name: spread.start_helper(spread.away(ids)) for name, ids in spread.HERE.items()}
    pipelines = {"alone": spread.load(None)}
    for name, ids in spread.HERE.items():
        pipelines[name] = spread.load(spread.each_layer(ids))
        pipelines[name].stages[0].join_helpers([(helpers[name][1], spread.away(ids))])
    node = replace(probe_node("one-thread", "127.0.0.1", Path.home()), num_cpus=1)
    node = measure_speeds(node, ModelGauge(), again=True)
    for num_rows in (1, 8):
        told = spread_predictions(node, link, num_rows)
        seen = spread.measure(pipelines, num_rows, 10 * rounds)
        for name, seconds in told.items():
            case = f"spread-{num_rows}-rows-{name.replace(' ', '-')}"
            yield compared(case, seconds, statistics.quantiles(seen[name], n=4)[0])
    for process, asked in helpers.values():
        asked.close()
        process.join()


def calibrate_stages(model: str, node: Node, link: Link, rounds: int) -> Iterator[dict[str, Any]]:
    """A model through rings of processes."""
    folder = model_folder(model)
    for num_stages in STAGES:
        engine = Engine(model=model, stages=num_stages)
        told = predicted_s(folder, node, link, num_stages, engine.dtype)
        seen = measured_s(engine, node.num_cpus, rounds)
        yield compared(f"{model}-{num_stages}-stages", told, seen)


def compared(case: str, told_s: float, seen_s: float) -> dict[str, Any]:
    """A row of the results."""
    ratio = told_s / seen_s
    holds = abs(ratio - 1) <= GOAL
    print(
        f"{case:<28} {told_s * 1e3:10.2f} {seen_s * 1e3:10.2f} {ratio:6.2f}"
        f"  {'yes' if holds else 'no'}",
        file=sys.stderr,
    )
    return {
        "case": case,
        "ours": round(told_s * 1e3, 2),
        "reference": round(seen_s * 1e3, 2),
        "unit": "ms a step",
        "ratio": round(ratio, 3),
        "goal": GOAL,
        "holds": holds,
    }


def main() -> None:
    """Measures, predicts, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the demo model alone")
    parser.add_argument("--case", choices=CASES, help="one of them alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="add the objects to a file")
    args = parser.parse_args()
    results: list[dict[str, Any]] = [machine() | {"benchmark": "calibration"}]
    node = probe_node("here", "127.0.0.1", Path.home())
    node = measure_speeds(node, ModelGauge(), again=True)
    link = probe_itself(node.host, node.address)
    print(f"{'case':<28} {'predicted':>10} {'measured':>10} {'ratio':>6}  holds", file=sys.stderr)
    for case in [args.case] if args.case else ["demo"] if args.quick else CASES:
        rows = (
            calibrate_spread(link, args.rounds)
            if case == "spread"
            else calibrate_stages(case, node, link, args.rounds)
        )
        for row in rows:
            results.append(row)
            print(json.dumps(row), flush=True)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(each)}\n" for each in results)


if __name__ == "__main__":
    main()
