"""Small steps beside large ones where prompts take long: what plans for slow processors rest on.

    python benchmarks/step_sizes.py [--rounds N] [--output FILE]

Two stages of the synthetic Mixtral have a core each, as machines of their own would, and 16 clients
ask again and again, with prompts of 64 to 512 tokens and answers of 16 to 128. Engines with steps
of 128 and of 512 tokens take turns. Prints one JSON object per case: tokens per second in all, and
how long a client waits between two tokens in the worst hundredth.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magnetar.benchmarks.engine_process import model_folder
from magnetar.benchmarks.peers.magnetar_runner import Ring
from magnetar.benchmarks.rows import row
from magnetar.benchmarks.up import machine
from magnetar.serve.engine.request import GenerationParams

SMALL, LARGE = 128, 512
PROMPTS, ANSWERS = (64, 128, 256, 512), (16, 32, 64, 128)
CLIENTS = 16
ROUND_S = 24.0
WARM_S = 6.0
"""Of a round, that do not count."""


async def closed_loop(ring: Ring, seed: int) -> tuple[float, float]:
    """Tokens per second, and seconds between two tokens that one in a hundred goes beyond."""
    begins = time.perf_counter() + WARM_S
    ends = begins + ROUND_S - WARM_S
    gaps: list[float] = []

    async def client(number: int) -> int:
        draw, count = random.Random(f"{seed}/{number}"), 0
        while time.perf_counter() < ends:
            prompt = [
                draw.randrange(3, ring.config.vocab_size) for _ in range(draw.choice(PROMPTS))
            ]
            wishes = GenerationParams(max_tokens=draw.choice(ANSWERS), ignore_eos=True)
            events, last = ring.engine.generate(prompt, wishes), None
            async for _ in events:
                now = time.perf_counter()
                if now > ends:
                    break
                if now > begins:
                    count += 1
                    gaps.extend([now - last] if last is not None else [])
                last = now
            await events.aclose()
        return count

    made = sum(await asyncio.gather(*map(client, range(CLIENTS))))
    while ring.engine.stats().running:
        await asyncio.sleep(0.01)
    return made / (ROUND_S - WARM_S), statistics.quantiles(gaps, n=100)[-1]


def compared(rounds: int) -> Iterator[dict[str, Any]]:
    """Both sizes in turns; ratios are medians over rounds."""
    folder = model_folder("moe")
    rings = {
        size: Ring(
            folder, num_stages=2, dtype="bf16", threads=1, steps_at_once=2, max_step_tokens=size
        )
        for size in (SMALL, LARGE)
    }
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in rings}
    for number in range(rounds):
        for size in sorted(rings, reverse=number % 2 > 0):
            found[size].append(asyncio.run(closed_loop(rings[size], number)))
    for at, name, goal in (
        (0, "tokens/s", "> 1"),
        (1, "seconds between two tokens, 99th percentile", "< 1"),
    ):
        small, large = ([each[at] for each in found[size]] for size in (SMALL, LARGE))
        ratio = statistics.median(a / b for a, b in zip(small, large, strict=True))
        case = f"steps of {SMALL} to {LARGE} tokens, 16 clients on two stages: {name}"
        yield row(
            case,
            statistics.median(small),
            statistics.median(large),
            goal,
            ratio > 1 if at == 0 else ratio < 1,
        ) | {"ratio": round(ratio, 3), "rounds": [small, large]}


def main() -> None:
    """Runs both cases."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="of each size")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    args = parser.parse_args()
    objects = [machine(), *compared(args.rounds)]
    for each in objects:
        print(json.dumps(each), flush=True)
    if args.output:
        args.output.write_text("".join(json.dumps(each) + "\n" for each in objects), "utf-8")
    os._exit(0)  # the stages of both rings with it


if __name__ == "__main__":
    main()
