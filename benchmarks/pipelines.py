"""Two pipelines beside one, and what choosing between them takes.

    python benchmarks/pipelines.py [--quick] [--output FILE]

Sixteen streams run through one pipeline and through two behind a router, in turns. Once the
pipelines have a stage of one thread each, on one machine, and a model of the form of Mixtral: both
read its weights from the same memory. Once they are as if on machines of their own: a stage waits
`ROW_S` for every row of a step. Then the router's own time is taken on idle engines: of a request
whose prompt nobody has, of one whose prompt is in a cache, and of a token that passes through it.
Prints one JSON object per case.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magnetar.benchmarks.peers.magnetar_runner import Ring
from magnetar.benchmarks.synthetic import Shape, write_model
from magnetar.benchmarks.up import machine
from magnetar.serve.api.served_model import EngineLike
from magnetar.serve.engine.engine import Engine
from magnetar.serve.engine.request import GenerationParams, TokenEvent
from magnetar.serve.engine.router import Routed, Router
from magnetar.serve.engine.stats import EngineStats
from magnetar.serve.engine.step import SamplingParams, StepPlan, StepResult
from magnetar.tests.fake_stage import FakeStage, running_engine

if TYPE_CHECKING:
    import torch

SHAPE = Shape(
    dim=1024,
    hidden_dim=2816,
    num_layers=4,
    num_heads=16,
    num_kv_heads=4,
    num_experts=8,
    vocab_size=4096,
)
FOLDER = Path("~/.cache/magnetar-benchmarks/pipelines").expanduser()
NUM_STREAMS = 16
NUM_PROMPT = 32
ROW_S = 0.001
NUM_TOKENS = 48
"""Of each stream, in a round."""
LONG_PROMPT = 960
APART_GOAL = 1.9
GOAL_US = 200.0
"""Of a request: no more than one streamed token may take."""
TOKEN_GOAL_US = 10.0


class WaitingStage(FakeStage):
    """Takes time, but nobody's processor."""

    def step(self, plan: StepPlan, hidden_TD: "torch.Tensor | None") -> "torch.Tensor | StepResult":
        """As `Stage.step`."""
        time.sleep(ROW_S * sum(len(row.token_ids) for row in plan.rows))
        return super().step(plan, hidden_TD)


def greedy(num_tokens: int) -> GenerationParams:
    """An answer of so many tokens."""
    return GenerationParams(
        max_tokens=num_tokens, ignore_eos=True, sampling=SamplingParams(temperature=0.0)
    )


async def stream_all(engine: EngineLike, turn: int) -> float:
    """Tokens per second of all streams together, prompts included; no prompt comes twice."""

    async def one(number: int) -> int:
        start = (turn * NUM_STREAMS + number) * 37
        prompt = [(start + 7 * index) % 1000 for index in range(NUM_PROMPT)]
        return len([None async for _ in engine.generate(prompt, greedy(NUM_TOKENS))])

    began = time.perf_counter()
    counts = await asyncio.gather(*map(one, range(NUM_STREAMS)))
    return sum(counts) / (time.perf_counter() - began)


async def throughput(engines: dict[str, EngineLike], num_rounds: int) -> dict[str, float]:
    """Medians over rounds in which all take turns; the first warms up."""
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(num_rounds + 1):
        for name, engine in engines.items():
            rate = await stream_all(engine, turn)
            if turn:
                rates[name].append(rate)
    return {name: statistics.median(of) for name, of in rates.items()}


class Told:
    """An idle engine that answers without its stages."""

    lost = None

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def holds(self, digest: bytes) -> bool:
        """As the engine."""
        return self._engine.holds(digest)

    async def probe(self) -> float:
        """As the engine."""
        return await self._engine.probe()

    def stats(self) -> EngineStats:
        """As the engine."""
        return self._engine.stats()

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        *,
        begun_ids: Sequence[int] | None = None,
    ) -> AsyncGenerator[TokenEvent, None]:
        """As many tokens as asked for, at once."""
        for token_id in range(params.max_tokens):
            yield TokenEvent(token_id=token_id)


async def added_us(router: Router, alone: Told, prompt: Sequence[int], num_tokens: int) -> float:
    """What a request takes longer behind the router."""

    async def spent(engine: Any) -> float:
        began = time.thread_time()
        async for _ in engine.generate(prompt, greedy(num_tokens)):
            pass
        return (time.thread_time() - began) * 1e6

    readings = [(await spent(router), await spent(alone)) for _ in range(200)]
    return statistics.median(behind - before for behind, before in readings)


async def router_cost(engines: Sequence[Engine]) -> dict[str, float]:
    """Microseconds by case."""
    told = [Told(engine) for engine in engines]
    router = Router([Routed(engine=each, speed=1.0, max_running=64) for each in told])
    known = [(7 * index) % 1000 for index in range(LONG_PROMPT)]
    async for _ in engines[0].generate(known, greedy(1)):
        pass
    unknown = [token + 1 for token in known]
    one = await added_us(router, told[0], unknown, 1)
    return {
        f"router, {LONG_PROMPT} tokens that nobody has": one,
        f"router, {LONG_PROMPT} tokens in a cache": await added_us(router, told[0], known, 1),
        "router, a token": (await added_us(router, told[0], unknown, 1001) - one) / 1000,
    }


async def measured(
    engines: Sequence[Engine], num_rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens per second of one pipeline and of two, and the router's microseconds."""
    router = Router([Routed(engine=each, speed=1.0, max_running=64) for each in engines])
    rates = await throughput({"one": engines[0], "two": router}, num_rounds)
    return rates, await router_cost(engines)


def rows(num_rounds: int) -> list[dict[str, Any]]:
    """One object for each case."""
    write_model(FOLDER, SHAPE)
    rings = [Ring(FOLDER, num_stages=1, dtype="bf16", threads=1) for _ in range(2)]
    beside, costs = asyncio.run(measured([ring.engine for ring in rings], num_rounds))
    with contextlib.ExitStack() as stack:
        engines = []
        for _ in range(2):
            stage = WaitingStage(num_kv_blocks=1024, is_first=True, is_last=True)
            engines.append(stack.enter_context(running_engine([stage], num_kv_blocks=1024))[0])
        apart, _ = asyncio.run(measured(engines, num_rounds))
    found: list[dict[str, Any]] = []
    for name, rates in (("on one memory", beside), ("apart", apart)):
        ratio = rates["two"] / rates["one"]
        judged = {"goal": f">= {APART_GOAL:g}", "holds": ratio >= APART_GOAL}
        found.append(
            {
                "case": f"{NUM_STREAMS} streams, two pipelines beside one, {name}",
                "ours": round(rates["two"], 1),
                "reference": round(rates["one"], 1),
                "unit": "tokens/s",
                "ratio": round(ratio, 3),
                **(judged if name == "apart" else {}),
            }
        )
    for case, spent_us in costs.items():
        goal_us = TOKEN_GOAL_US if case.endswith("a token") else GOAL_US
        found.append(
            {
                "case": case,
                "ours": round(spent_us, 2),
                "reference": goal_us,
                "unit": "us",
                "ratio": round(spent_us / goal_us, 3),
                "goal": "<= 1",
                "holds": spent_us <= goal_us,
            }
        )
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    given = parser.parse_args()
    about = machine()
    found = rows(2 if given.quick else 5)
    for row in found:
        print(f"{row['case']:72} {row['ours']:9} {row['ratio']:6}", file=sys.stderr)
    lines = [json.dumps(row) for row in [about, *found]]
    print("\n".join(lines[1:]), flush=True)
    if given.output is not None:
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os._exit(0)  # the stages are daemons of this process


if __name__ == "__main__":
    main()
