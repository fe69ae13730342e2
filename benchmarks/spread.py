"""What it costs to compute experts of a stage in a helper, over loopback.

    python benchmarks/spread.py [--quick] [--output FILE]

One stage with all experts, one with none (a helper has them all: nothing overlaps, so that what is
added is the way there and back), and one with every other expert, beside a helper with the rest.
They take turns in every round. The stage and the helper have one thread each; the model has the
form of Mixtral, two layers and random weights. Prints one JSON object per case on stdout:
milliseconds of a step (medians), and what one layer takes longer than without a helper.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Weights in huge pages, as the actors ask for; torch reads it when it is imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from magnetar.benchmarks.synthetic import Shape, write_model
from magnetar.benchmarks.up import machine
from magnetar.cluster.links.dial import dial
from magnetar.cluster.links.listener import LinkListener
from magnetar.errors import StageLostError
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ModelConfig, ReleaseHints
from magnetar.serve.engine.helper import Helper
from magnetar.serve.engine.helper_link import HelperLink
from magnetar.serve.engine.helper_worker import HelperWorker
from magnetar.serve.model.traffic import ExpertTraffic
from magnetar.tests.stages import Pipeline

SHAPE = Shape(
    dim=2048,
    hidden_dim=5632,
    num_layers=2,
    num_heads=16,
    num_kv_heads=4,
    num_experts=8,
    vocab_size=1024,
)
FOLDER = Path("~/.cache/magnetar-benchmarks/spread").expanduser()
SECRET = b"benchmark" * 4
HERE = {"none here": (), "half here": (0, 2, 4, 6)}
ROUNDS = {1: 80, 8: 40, 512: 6}
MOST_ADDED_US = 300
"""By `cost.py`: two messages of 100 us and their way over loopback."""

Experts = Mapping[int, Sequence[int]]


def main() -> None:
    """Time all placements side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the results there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = [{"case": "machine", **machine()}]
    write_model(FOLDER, SHAPE)
    helpers = {name: start_helper(away(ids)) for name, ids in HERE.items()}
    pipelines = {"alone": load(None)}
    for name, ids in HERE.items():
        pipelines[name] = load(each_layer(ids))
        pipelines[name].stages[0].join_helpers([(helpers[name][1], away(ids))])
    for num_rows, rounds in ROUNDS.items():
        rounds = max(2, rounds // 4) if arguments.quick else rounds
        seconds = measure(pipelines, num_rows, rounds)
        for name in HERE:
            results.append(compared(name, num_rows, seconds[name], seconds["alone"]))
            print(json.dumps(results[-1]), flush=True)
        if num_rows == 1:
            results.append(counted(statistics.median(seconds["alone"])))
            print(json.dumps(results[-1]), flush=True)
    for process, link in helpers.values():
        link.close()
        process.join()
    if arguments.output is not None:
        arguments.output.write_text("".join(f"{json.dumps(each)}\n" for each in results))


def each_layer(ids: Sequence[int]) -> Experts:
    """The same experts of every layer."""
    return dict.fromkeys(range(SHAPE.num_layers), tuple(ids))


def away(here: Sequence[int]) -> Experts:
    """What a helper has to hold."""
    return each_layer([expert for expert in range(SHAPE.num_experts) if expert not in here])


def load(here: Experts | None) -> Pipeline:
    """A stage with the whole model but for experts that are not here."""
    config, source = release()
    return Pipeline(config, source, dtype="bf16", num_kv_blocks=1024, held_experts=here)


def release() -> tuple[ModelConfig, FileTensorSource]:
    """The model of random weights."""
    facts = read_release(FolderReader(FOLDER), given=ReleaseHints(), known=ReleaseHints())
    return facts.config, FileTensorSource(FOLDER, facts.index)


def start_helper(experts: Experts) -> tuple[multiprocessing.process.BaseProcess, HelperLink]:
    """A process with these experts, and the link to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=help_stage, args=(theirs, dict(experts)))
    process.start()
    link = dial(ours.recv(), secret=SECRET, deployment="b", epoch=0, timeout_s=60)
    return process, HelperLink(link, name="the helper")


def help_stage(told: Connection, experts: Experts) -> None:
    """What the process does until its stage hangs up."""
    torch.set_num_threads(1)
    config, source = release()
    helper = Helper.load(config=config, source=source, experts=experts, dtype="bf16", device="cpu")
    listener = LinkListener(host="127.0.0.1", secret=SECRET, deployment="b", epoch=0)
    told.send(listener.address)
    worker = HelperWorker(helper, link=listener.accept(60), name="the helper")
    worker.start()
    with contextlib.suppress(StageLostError):  # the stage hangs up
        worker.wait()
    worker.stop()
    listener.close()


def measure(
    pipelines: Mapping[str, Pipeline], num_rows: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step by placement; the first round warms up and does not count."""
    generator = torch.Generator().manual_seed(num_rows)
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for turn in range(rounds + 1):
        tokens = torch.randint(SHAPE.vocab_size, (num_rows,), generator=generator).tolist()
        for name, pipeline in pipelines.items():
            if num_rows < 512:  # each token of a request of its own
                rows = [pipeline.row(1000 * num_rows + n, [t]) for n, t in enumerate(tokens)]
            else:
                rows = [pipeline.row(10_000_000 + turn, tokens)]
            plan = pipeline.plan(*rows)
            began = time.perf_counter()
            pipeline.stages[0].forward(plan, None)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(name: str, num_rows: int, ours: list[float], alone: list[float]) -> dict[str, Any]:
    """One placement beside all experts on one node."""
    ours_s, alone_s = statistics.median(ours), statistics.median(alone)
    added = statistics.median(a - b for a, b in zip(ours, alone, strict=True)) / SHAPE.num_layers
    goal = MOST_ADDED_US if name == "none here" and num_rows == 1 else None
    ratio = ours_s / alone_s
    print(
        f"{num_rows:4} rows, {name}: {ours_s * 1e3:8.2f} ms, on one node {alone_s * 1e3:8.2f} ms, "
        f"{added * 1e6:+8.0f} us a layer",
        file=sys.stderr,
    )
    return {
        "case": f"{num_rows} rows, {name}",
        "ours": round(ours_s * 1e3, 3),
        "reference": round(alone_s * 1e3, 3),
        "ratio": round(ratio, 3),
        "added_us_per_layer": round(added * 1e6),
        "goal": "ratio <= 1" if goal is None else f"added_us_per_layer <= {goal}",
        "holds": ratio <= 1 if goal is None else added * 1e6 <= goal,
    }


def counted(step_s: float) -> dict[str, Any]:
    """What counting the choices of experts takes of a step of one row."""
    traffic, choices = ExpertTraffic(SHAPE.num_experts), torch.tensor([[3, 5]])
    num_steps = 20_000
    began = time.perf_counter()
    for _ in range(num_steps):
        traffic.add(choices)
    traffic.totals()
    spent_s = (time.perf_counter() - began) / num_steps * SHAPE.num_layers
    print(f"counting: {spent_s * 1e6:.2f} us of {step_s * 1e6:.0f} us", file=sys.stderr)
    return {
        "case": "counts of experts, 1 row",
        "ours": round(spent_s * 1e3, 6),
        "reference": round(step_s * 1e3, 3),
        "ratio": round(spent_s / step_s, 6),
        "goal": "ratio <= 0.01",
        "holds": spent_s <= step_s / 100,
    }


if __name__ == "__main__":
    main()
