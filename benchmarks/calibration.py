"""Predicted step times beside measured ones: 1, 2 and 4 stages, contexts, prompts, helpers.

    python benchmarks/calibration.py                  the demo model, the synthetic Mixtral, helpers
    python benchmarks/calibration.py --case demo      one of the cases
    python benchmarks/calibration.py --quick          the demo model alone

The machine is measured as `magnetar nodes` does, the plan is made as `magnetar plan --stages N`
makes it, and the engine then decodes as deployed: a process a stage, joined by links; and computes
a prompt, on one stage. Contexts and chunks of prompts are those of one stage in this process, with
some of the layers. Helpers are those of `spread.py`, with one thread each.

The gauge of the planner measures again before and after every round: what holds or not is the
prediction for the machine that the rounds ran on, by the rounds in which it stayed the same and
was ours (`steady_rounds.py`). With too few of these a case is open: it neither holds nor fails.
`before` has the prediction for the machine as it was measured first. Prints a table and every
round on stderr and one JSON object per case on stdout; a ratio is predicted over measured, GB/s
are those of a plain sum and of the gauge.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# As `prepare_threads` has it; torch reads both when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np

from magnetar.benchmarks import spread
from magnetar.benchmarks.cases import Engine
from magnetar.benchmarks.engine_process import Runner, command, model_folder
from magnetar.benchmarks.peers.runner import Task
from magnetar.benchmarks.rounds_gauge import Moment, RoundsGauge
from magnetar.benchmarks.steady_rounds import Round, median_ratio, rounds_of, steady
from magnetar.benchmarks.synthetic import write_model
from magnetar.benchmarks.up import machine
from magnetar.benchmarks.whole_steps import WHOLE_STEPS, FirstLayers
from magnetar.cluster.inventory.inventory import probe_node
from magnetar.cluster.inventory.link_probe import probe_itself
from magnetar.cluster.inventory.measure import measure_speeds
from magnetar.cluster.inventory.pieces import lower_quartile
from magnetar.cluster.machines import ComputeDtype, Inventory, Link, Node
from magnetar.cluster.plan import Prediction, Workload
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
from magnetar.fetcher.config import ModelConfig, ReleaseHints
from magnetar.serve.gauge import ModelGauge

QUICK = ("demo", "demo-contexts", "demo-chunks")
CASES = (*QUICK, "moe", "moe-contexts", "moe-chunks", "spread")
STAGES = (1, 2, 4)
DTYPE: ComputeDtype = "bf16"
GOAL = 0.2
"""Share of the measured time by which a prediction may be off."""
NUM_TOKENS = 32
CONTEXT_TOKENS = 64
"""About what a task has in use; the planner counts half of it."""
PROMPT_TOKENS = 1024
"""Of the prompt that a plan tells the time of."""
NUM_LAYERS = 4
"""Of a stage whose steps have long contexts, or chunks of prompts."""
MOST = 4
"""Rounds, for each that shall be steady."""
LEAST_STEADY = 3
"""Rounds that a verdict needs."""
ROWS = (1, 8)
SPREAD_STEPS = 12
"""Of every placement in a round."""


def stages_predicted(folder: Path, link: Link, num_stages: int, node: Node) -> dict[str, float]:
    """One step around all stages, as the planner says; of one stage the first token, too."""
    found = {f"{num_stages}-stages": _planned(folder, link, num_stages, node, CONTEXT_TOKENS)}
    told = {name: each.round_trip_s for name, each in found.items()}
    if num_stages == 1:
        long = _planned(folder, link, num_stages, node, PROMPT_TOKENS)
        assert long.prefill_tokens == PROMPT_TOKENS
        told["prompt"] = long.prefill_s
    return told


def _planned(folder: Path, link: Link, num_stages: int, node: Node, context: int) -> Prediction:
    facts = read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())
    workload = Workload(
        max_context_tokens=context,
        max_concurrency=1,
        num_stages=num_stages,
        dtype=DTYPE,
        objective="latency",
    )
    found = plan(facts.config, facts.index, Inventory(nodes=(node,), links=(link,)), workload)
    assert found.prediction is not None
    return found.prediction


def calibrate_stages(
    model: str, counts: Sequence[int], node: Node, link: Link, enough: int
) -> Iterator[dict[str, Any]]:
    """A model through rings of processes: the time between two tokens of one stream, and from a
    prompt to its first token."""
    folder, gauge, seeds = model_folder(model), RoundsGauge(node, DTYPE), itertools.count()
    for num_stages in counts:
        engine = Engine(model=model, stages=num_stages)
        runner = Runner(engine, command(engine, peers=Path(), threads=node.num_cpus))

        def predict(seen: Moment, num_stages: int = num_stages) -> dict[str, float]:
            return stages_predicted(folder, link, num_stages, seen.node)

        def measure(runner: Runner = runner, num_stages: int = num_stages) -> dict[str, float]:
            task = Task(kind="decode", num_streams=1, num_tokens=NUM_TOKENS)
            found = {f"{num_stages}-stages": runner.measure(task)["gap_p25_s"]}
            if num_stages == 1:  # with keys and values of nobody's, so that all is computed
                task = Task(kind="prefill", num_prompt=PROMPT_TOKENS, seed=next(seeds))
                found["prompt"] = runner.measure(task)["seconds"]
            return found

        try:
            runner.loaded()
            measure()
            told = stages_predicted(folder, link, num_stages, node)
            rounds = rounds_of(gauge, predict, measure, enough=enough, most=MOST * enough)
            yield from compared(model, told, rounds)
        finally:
            runner.close()


def calibrate_steps(model: str, kind: str, node: Node, enough: int) -> Iterator[dict[str, Any]]:
    """Steps of some layers: tokens of sequences with long contexts, or chunks of a prompt."""
    import torch

    torch.set_num_threads(node.num_cpus)
    layers, steps = (
        FirstLayers(model_folder(model), DTYPE, num_layers=NUM_LAYERS),
        WHOLE_STEPS[kind],
    )

    def predict(seen: Moment) -> dict[str, float]:
        speed = device_speed(seen.node.devices[0], DTYPE)
        assert speed is not None
        return {step.name: NUM_LAYERS * step.layer_s(layers.cost, speed) for step in steps}

    def measure() -> dict[str, float]:
        layers.seconds(steps[0])  # wakes who slept while the gauge paused
        return {step.name: layers.seconds(step) for step in steps}

    gauge = RoundsGauge(node, DTYPE)
    told = predict(gauge.measure())
    rounds = rounds_of(gauge, predict, measure, enough=enough, most=MOST * enough)
    yield from compared(f"{model}-{kind}", told, rounds)


def spread_predicted(link: Link, node: Node, both_gbps: float) -> dict[str, float]:
    """A step of the model of `spread.py` by where its experts are, as the cost model has it.

    Stage and helper stand for two machines but share the memory of this one: while both read, each
    gets `both_gbps`.
    """
    config, source = spread.release()
    cost, found = model_cost(config, source.index, DTYPE), {}
    speed = device_speed(node.devices[0], DTYPE)
    assert speed is not None
    crowded = replace(speed, read_gbps=min(speed.read_gbps, both_gbps))
    apart, beside = ([Seat(speed=each), Seat(speed=each, link=link)] for each in (speed, crowded))
    for rows in ROWS:
        around = embeddings_s(cost, speed, tokens=rows) + output_s(cost, speed, tokens=rows)
        attention = attention_s(cost, 0, speed, tokens=rows, context_tokens=CONTEXT_TOKENS)
        for name, here in {"alone": range(config.num_experts), **spread.HERE}.items():
            held_OHE = np.zeros((1, 2, config.num_experts), dtype=np.int64)
            held_OHE[0, 0, list(here)] = 1
            held_OHE[0, 1] = 1 - held_OHE[0, 0]
            alone_s, both_s = (
                float(hosts_s(cost, 0, each, held_OHE, tokens=rows)[0]) for each in (apart, beside)
            )
            both = _both_needed(len(here), config, rows)
            experts = both * both_s + (1 - both) * alone_s
            step_s = around + config.n_layers * (attention + experts)
            found[f"{rows}-rows-{name.replace(' ', '-')}"] = step_s
    return found


def _both_needed(here: int, config: ModelConfig, rows: int) -> float:
    """The probability that a step needs experts of the stage and of the helper."""
    every = math.comb(config.num_experts, config.num_experts_per_tok)
    one_side = [
        math.comb(held, config.num_experts_per_tok) / every
        for held in (here, config.num_experts - here)
    ]
    return 1 - sum(chance**rows for chance in one_side)


def calibrate_spread(link: Link, enough: int) -> Iterator[dict[str, Any]]:
    """Stages of one thread without a helper, and with one that has all or half of the experts."""
    import torch

    torch.set_num_threads(1)
    write_model(spread.FOLDER, spread.SHAPE)
    helpers = {name: spread.start_helper(spread.away(ids)) for name, ids in spread.HERE.items()}
    pipelines = {"alone": spread.load(None)}
    for name, ids in spread.HERE.items():
        pipelines[name] = spread.load(spread.each_layer(ids))
        pipelines[name].stages[0].join_helpers([(helpers[name][1], spread.away(ids))])
    node = replace(probe_node("one-thread", "127.0.0.1", Path.home()), num_cpus=1)
    node = measure_speeds(node, ModelGauge(), again=True)

    def measure() -> dict[str, float]:
        found = {}
        for rows in ROWS:
            for name, seconds in spread.measure(pipelines, rows, SPREAD_STEPS).items():
                found[f"{rows}-rows-{name.replace(' ', '-')}"] = lower_quartile(seconds)
        return found

    def predict(seen: Moment) -> dict[str, float]:
        return spread_predicted(link, seen.node, seen.both_gbps)

    gauge = RoundsGauge(node, DTYPE)
    told = spread_predicted(link, node, gauge.measure().both_gbps)
    rounds = rounds_of(gauge, predict, measure, enough=enough, most=MOST * enough)
    yield from compared("spread", told, rounds)
    for process, asked in helpers.values():
        asked.close()
        process.join()


def compared(
    name: str, before_s: Mapping[str, float], rounds: Sequence[Round]
) -> Iterator[dict[str, Any]]:
    """Rows of the results; `before_s` was predicted before there were rounds."""
    calm = steady(rounds)
    for case, told_s in before_s.items():
        shown = calm or rounds
        ratio, seen_s = (
            median_ratio(shown, case),
            statistics.median(each.seen_s[case] for each in shown),
        )
        holds = abs(ratio - 1) <= GOAL if len(calm) >= LEAST_STEADY else None
        row = {
            "case": f"{name}-{case}",
            "ours": _ms(statistics.median(each.told_s(case) for each in shown)),
            "reference": _ms(seen_s),
            "unit": "ms a step",
            "ratio": round(ratio, 3),
            "goal": GOAL,
            "holds": holds,
            "before": {"ours": _ms(told_s), "ratio": round(told_s / seen_s, 3)},
            "steady": len(calm),
            "rounds": [
                {
                    "ratio": round(each.ratio(case), 3),
                    "measured": _ms(each.seen_s[case]),
                    "plain_gbps": [round(gbps, 1) for gbps in each.plain_gbps],
                    "gauge_gbps": [round(gbps, 1) for gbps in each.gauge_gbps],
                    "others": round(each.others_share, 3),
                    "left_out": each.left_out,
                }
                for each in rounds
            ],
        }
        verdict = "open" if holds is None else "yes" if holds else "no"
        print(
            f"{row['case']:<26} {row['ours']:9.2f} {row['reference']:9.2f} {ratio:6.2f}"
            f"  {verdict:<5} {told_s / seen_s:6.2f}  {len(calm)} of {len(rounds)}",
            file=sys.stderr,
        )
        for each in rounds:
            before, after = each.gauge_gbps
            print(
                f"    {each.ratio(case):.2f}, {before:.1f} and {after:.1f} GB/s, "
                f"{each.others_share:.0%} others"
                + (f"; left out: {each.left_out}" if each.left_out else ""),
                file=sys.stderr,
            )
        yield row


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


def main() -> None:
    """Measures, predicts, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the demo model alone")
    parser.add_argument("--case", choices=CASES, help="one of them alone")
    parser.add_argument("--stages", type=int, action="append", help="only so many stages")
    parser.add_argument("--rounds", type=int, default=7, help="steady ones to wait for")
    parser.add_argument("--output", type=Path, help="add the objects to a file")
    args = parser.parse_args()
    about = machine() | {"benchmark": "calibration"}
    node = probe_node("here", "127.0.0.1", Path.home())
    node = measure_speeds(node, ModelGauge(), again=True)
    link = probe_itself(node.host, node.address)
    # Row by row, so that a run that is stopped keeps what it found; runs add to what there is.
    keep = args.output.open("a", encoding="utf-8") if args.output else None
    if keep is not None:
        about["busy_share"] = round(node.busy_share, 3)
        print(json.dumps(about), file=keep, flush=True)
    print(
        f"{'case':<26} {'predicted':>9} {'measured':>9} {'ratio':>6}  {'holds':<5} {'before':>6}"
        "  steady rounds",
        file=sys.stderr,
    )
    for case in [args.case] if args.case else QUICK if args.quick else CASES:
        model, _, kind = case.partition("-")
        if case == "spread":
            rows = calibrate_spread(link, args.rounds)
        elif kind:
            rows = calibrate_steps(model, kind, node, args.rounds)
        else:
            rows = calibrate_stages(case, args.stages or STAGES, node, link, args.rounds)
        for row in rows:
            print(json.dumps(row), flush=True)
            if keep is not None:
                print(json.dumps(row), file=keep, flush=True)


if __name__ == "__main__":
    main()
