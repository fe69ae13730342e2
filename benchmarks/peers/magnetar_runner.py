"""Our engine, through its real path: one process per stage, direct links, the engine beside them.

python magnetar_runner.py FOLDER --stages 1 --dtype bf16 --threads 2
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import multiprocessing
import os
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magnetar.benchmarks.peers.runner import Request, Task, claim_stdout, serve, served
from magnetar.cluster.links.dial import dial
from magnetar.cluster.links.listener import LinkListener
from magnetar.fetcher.checkpoint.release import FolderReader, ReleaseFacts, read_release
from magnetar.fetcher.config import ReleaseHints
from magnetar.serve.model.threads import end_team, prepare_threads
from magnetar.settings import KV_BLOCK_TOKENS

if TYPE_CHECKING:
    import torch

    from magnetar.serve.engine.stage import Stage
    from magnetar.serve.engine.step import StepPlan, StepResult

SECRET = bytes(32)
TIMEOUT_S = 300.0


def facts_of(folder: Path) -> ReleaseFacts:
    """What is in the release."""
    return read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())


def listen() -> LinkListener:
    """A link that waits for the neighbour before."""
    return LinkListener(host="127.0.0.1", secret=SECRET, deployment="benchmark", epoch=0)


def connect(address: str) -> Any:
    """A link to the neighbour after."""
    return dial(address, secret=SECRET, deployment="benchmark", epoch=0, timeout_s=TIMEOUT_S)


class TimedStage:
    """A stage that knows how long it has computed."""

    def __init__(self, stage: "Stage") -> None:
        self._stage = stage
        self.busy_s = 0.0

    def step(
        self, plan: "StepPlan", hidden_TD: "torch.Tensor | None"
    ) -> "torch.Tensor | StepResult":
        """As `Stage.step`."""
        began = time.perf_counter()
        try:
            return self._stage.step(plan, hidden_TD)
        finally:
            self.busy_s += time.perf_counter() - began


def run_stage(
    folder: Path,
    layers: tuple[int, int],
    pipe: Connection,
    *,
    dtype: str,
    threads: int,
    blocks: int,
    batch_invariant: bool,
) -> None:
    """The life of a stage process: load, join the ring, compute until the links close."""
    prepare_threads()
    import torch

    from magnetar.fetcher.checkpoint.source import FileTensorSource
    from magnetar.serve.engine.stage import Stage
    from magnetar.serve.engine.stage_worker import StageWorker

    torch.set_num_threads(threads)
    facts = facts_of(folder)
    first, end = layers
    stage = Stage.load(
        config=facts.config,
        source=FileTensorSource(folder, facts.index),
        first_layer=first,
        end_layer=end,
        has_embeddings=first == 0,
        has_output=end == facts.config.n_layers,
        dtype=dtype,
        device="cpu",
        num_kv_blocks=blocks,
    )
    end_team()  # the worker's thread computes
    timed = TimedStage(stage)
    listener = listen()
    pipe.send(listener.address)
    downstream = connect(pipe.recv())
    worker = StageWorker(timed, upstream=listener.accept(TIMEOUT_S), downstream=downstream)
    worker.start()
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while pipe.recv() == "busy":
            pipe.send(timed.busy_s)
    os._exit(0)


class Ring:
    """Stages in processes of their own, and the engine here."""

    def __init__(
        self,
        folder: Path,
        *,
        num_stages: int,
        dtype: str,
        threads: int,
        batch_invariant: bool = False,
        steps_at_once: int = 1,
        max_step_tokens: int | None = None,
    ) -> None:
        """Stages of one machine take turns, as plans have it, unless more steps go at once."""
        from magnetar.serve.engine.engine import Engine

        facts = facts_of(folder)
        self.config = facts.config
        blocks = 64 * 1024 // KV_BLOCK_TOKENS // 2
        bounds = [index * self.config.n_layers // num_stages for index in range(num_stages + 1)]
        context = multiprocessing.get_context("spawn")
        self._pipes, addresses = [], []
        for layers in pairwise(bounds):
            ours, theirs = context.Pipe()
            context.Process(
                target=run_stage,
                args=(folder, layers, theirs),
                kwargs={
                    "dtype": dtype,
                    "threads": threads,
                    "blocks": blocks,
                    "batch_invariant": batch_invariant,
                },
                daemon=True,
            ).start()
            theirs.close()  # so that a stage that dies is an end of file here
            self._pipes.append(ours)
        addresses = [pipe.recv() for pipe in self._pipes]
        listener = listen()
        for pipe, address in zip(self._pipes, [*addresses[1:], listener.address], strict=True):
            pipe.send(address)
        downstream = connect(addresses[0])
        upstream = listener.accept(TIMEOUT_S)
        for pipe in self._pipes:
            pipe.recv()
        self.engine = Engine(
            config=self.config,
            num_kv_blocks=blocks,
            max_context_tokens=self.config.max_context_tokens,
            max_running=64,
            max_waiting=256,
            num_stages=steps_at_once,
            max_step_tokens=max_step_tokens,
            downstream=downstream,
            upstream=upstream,
            eos_token_ids=(),
        )
        self.engine.start()

    def busy_s(self) -> list[float]:
        """Seconds that each stage has computed so far."""
        for pipe in self._pipes:
            pipe.send("busy")
        return [pipe.recv() for pipe in self._pipes]

    async def measure(self, task: Task) -> dict[str, Any]:
        """See `Task`."""
        if task.kind == "load":
            return await self._serve(task.requests(self.config.vocab_size))
        prompts = task.prompts(self.config.vocab_size)
        if task.kind == "prefill":
            began = time.perf_counter()
            await self._stream(prompts[0], 1, [], asyncio.Event())
            return {"seconds": time.perf_counter() - began, "num_tokens": task.num_prompt}
        stamps: list[list[float]] = [[] for _ in prompts]
        news = asyncio.Event()

        async def until_each_has(num_tokens: int, *, since: float) -> None:
            while min(sum(t > since for t in times) for times in stamps) < num_tokens:
                news.clear()
                await news.wait()

        # Those that begin first go on until the last has begun, so they may have longer to go.
        num_tokens = 2 * task.num_tokens + task.num_streams
        streams = [
            asyncio.create_task(self._stream(prompt, num_tokens, times, news))
            for prompt, times in zip(prompts, stamps, strict=True)
        ]
        await until_each_has(1, since=0.0)
        began, busy_s = time.perf_counter(), self.busy_s()
        # Not by a clock: its ticks would take the cores from the stages.
        await until_each_has(task.num_tokens, since=began)
        ended = time.perf_counter()
        busy = [(b - a) / (ended - began) for a, b in zip(busy_s, self.busy_s(), strict=True)]
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        while self.engine.stats().running:
            await asyncio.sleep(0.002)
        inside = [[t for t in times if began < t <= ended] for times in stamps]
        gaps = sorted(b - a for times in inside for a, b in pairwise(times))
        return {
            "seconds": ended - began,
            "num_tokens": sum(map(len, inside)),
            "busy": [round(ratio, 3) for ratio in busy],
            "gap_p25_s": gaps[len(gaps) // 4],
            "gap_p50_s": gaps[len(gaps) // 2],
        }

    async def _serve(self, requests: list[Request]) -> dict[str, Any]:
        began = time.perf_counter()

        async def answer(request: Request) -> float:
            await asyncio.sleep(request.arrival_s - (time.perf_counter() - began))
            times: list[float] = []
            await self._stream(request.prompt, request.num_tokens, times, asyncio.Event())
            return times[0] - began - request.arrival_s

        first_token_s = await asyncio.gather(*map(answer, requests))
        return served(requests, time.perf_counter() - began, first_token_s)

    async def _stream(
        self, prompt: list[int], num_tokens: int, times: list[float], news: asyncio.Event
    ) -> None:
        """One request; `times` gets the moment of every token, and `news` is set."""
        from magnetar.serve.engine.request import GenerationParams
        from magnetar.serve.engine.step import SamplingParams

        params = GenerationParams(
            max_tokens=num_tokens, ignore_eos=True, sampling=SamplingParams(temperature=0.0)
        )
        async with contextlib.aclosing(self.engine.generate(prompt, params)) as events:
            async for _ in events:
                times.append(time.perf_counter())
                news.set()


def main() -> None:
    """Load, then answer tasks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-invariant", action="store_true")
    args = parser.parse_args()
    claim_stdout()
    ring = Ring(
        args.folder,
        num_stages=args.stages,
        dtype=args.dtype,
        threads=args.threads,
        batch_invariant=args.batch_invariant,
    )
    versions = {name: importlib.metadata.version(name) for name in ("magnetar", "torch")}
    serve(versions, lambda task: asyncio.run(ring.measure(task)))
    os._exit(0)  # the stages are daemons of this process


if __name__ == "__main__":
    main()
