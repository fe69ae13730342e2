"""The cost of a streamed token beside the model: CPU of the HTTP server and the engine.

    python benchmarks/streaming.py

The server and the engine run in one process, as on the node where a service was asked for. The
clients, who read server-sent events, run in another, and so does the one stage: it computes nothing
but takes `STEP_S` for each step. A reading is the processor time of the first process, the kernel's
part included, over the tokens that the clients got. Prints a JSON object per number of streams;
with ``--output FILE`` they are kept after a first object that describes the machine.
"""

import argparse
import asyncio
import json
import multiprocessing
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from magnetar.benchmarks.scheduler import machine
from magnetar.cluster.links.dial import dial
from magnetar.cluster.links.link import TcpLink
from magnetar.cluster.links.listener import LinkListener
from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.step import Sample, StepPlan, StepResult
from magnetar.serve.text.sentencepiece_tokenizer import SentencePieceTokenizer
from magnetar.tests.api_server import listening
from magnetar.tests.tokenizers_for_tests import mistral_tokenizer_file

GOAL_MS = 0.2
STREAMS = (1, 8, 32)
JUDGED = 8
"""The number of streams that the goal is for."""
STEP_S = 0.01
NUM_TOKENS = 300
"""Of each stream, in a round."""
SECRET = bytes(32)
TIMEOUT_S = 60.0
NUM_KV_BLOCKS = 4096
WISH = {
    "prompt": "Once upon a time there was a machine that read, and",
    "max_tokens": NUM_TOKENS,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


class ReadingStage:
    """Reads Python's manual out instead of computing."""

    def __init__(self) -> None:
        tokenizer = SentencePieceTokenizer(mistral_tokenizer_file())
        self._token_ids = tokenizer.encode(pydoc_data.topics.topics["objects"], add_bos=False)

    def step(self, plan: StepPlan, hidden_TD: object) -> StepResult:
        """As `Stage.step`."""
        time.sleep(STEP_S)
        token_ids = self._token_ids
        samples = [
            Sample(request_id=row.request_id, token_id=token_ids[row.position % len(token_ids)])
            for row in plan.rows
            if row.sampling is not None
        ]
        return StepResult(step_id=plan.step_id, samples=tuple(samples))


def run_stage(pipe: Connection) -> None:
    """The process of the stage, until its links close."""
    from magnetar.serve.engine.stage_worker import StageWorker

    stage = ReadingStage()
    upstream, downstream = _join(pipe)
    worker = StageWorker(stage, upstream=upstream, downstream=downstream)
    worker.start()
    while worker.is_alive():
        time.sleep(0.1)


def _join(pipe: Connection) -> tuple[TcpLink, TcpLink]:
    """The links from the neighbour before and to the one after."""
    listener = LinkListener(host="127.0.0.1", secret=SECRET, deployment="benchmark", epoch=0)
    pipe.send(listener.address)
    address = pipe.recv()
    downstream = dial(address, secret=SECRET, deployment="benchmark", epoch=0, timeout_s=TIMEOUT_S)
    return listener.accept(TIMEOUT_S), downstream


def run_clients(pipe: Connection) -> None:
    """The process of the clients: numbers of streams come in, the tokens they got go out."""
    address = pipe.recv()
    while num_streams := pipe.recv():
        pipe.send(asyncio.run(_read_all(address, num_streams)))


async def _read_all(address: str, num_streams: int) -> int:
    return sum(await asyncio.gather(*(_read(address) for _ in range(num_streams))))


async def _read(address: str) -> int:
    """One streamed answer; how many tokens it had."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps(WISH).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    last = b""
    async for line in reader:
        if line.startswith(b"data: {"):
            last = line
    writer.close()
    num_tokens: int = json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"]
    return num_tokens


@contextmanager
def service() -> Iterator[Callable[[int], int]]:
    """A server in this process; what it gives runs so many streams and returns their tokens."""
    from magnetar.serve.engine.engine import Engine

    context = multiprocessing.get_context("spawn")
    (stage, stage_end), (clients, clients_end) = context.Pipe(), context.Pipe()
    for target, end in ((run_stage, stage_end), (run_clients, clients_end)):
        context.Process(target=target, args=(end,), daemon=True).start()
    address = stage.recv()
    listener = LinkListener(host="127.0.0.1", secret=SECRET, deployment="benchmark", epoch=0)
    stage.send(listener.address)
    downstream = dial(address, secret=SECRET, deployment="benchmark", epoch=0, timeout_s=TIMEOUT_S)
    tokenizer = SentencePieceTokenizer(mistral_tokenizer_file())
    engine = Engine(
        config=ModelConfig(
            dim=1,
            n_layers=1,
            head_dim=1,
            hidden_dim=1,
            n_heads=1,
            n_kv_heads=1,
            norm_eps=1e-5,
            vocab_size=tokenizer.vocab_size,
            rope_theta=1e4,
            max_context_tokens=4096,
        ),
        num_kv_blocks=NUM_KV_BLOCKS,
        max_context_tokens=4096,
        max_running=64,
        max_waiting=256,
        num_stages=1,
        downstream=downstream,
        upstream=listener.accept(TIMEOUT_S),
        eos_token_ids=tokenizer.eos_ids,
    )
    engine.start()

    def run(num_streams: int) -> int:
        clients.send(num_streams)
        num_tokens: int = clients.recv()
        return num_tokens

    try:
        with listening(engine, tokenizer=tokenizer, max_context_tokens=4096) as server:
            clients.send(server.address)
            yield run
            clients.send(0)
    finally:
        engine.stop()
        listener.close()


def rows(num_rounds: int) -> list[dict[str, Any]]:
    """One object for each number of streams."""
    readings: dict[int, list[float]] = {num_streams: [] for num_streams in STREAMS}
    with service() as run:
        run(1)
        for _ in range(num_rounds):
            for num_streams in STREAMS:
                began_s = time.process_time()
                num_tokens = run(num_streams)
                readings[num_streams].append((time.process_time() - began_s) / num_tokens * 1e3)
    found = []
    for num_streams, of in readings.items():
        ours = statistics.median(of)
        case = f"CPU of a streamed token, {num_streams} streams, ms"
        line: dict[str, Any] = {"case": case, "ours": round(ours, 3)}
        if num_streams == JUDGED:
            line |= {"ratio": round(ours / GOAL_MS, 3), "goal": f"<= {GOAL_MS:g} ms"}
            line["holds"] = ours <= GOAL_MS
        found.append(line)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the JSON objects there")
    given = parser.parse_args()
    lines = [json.dumps(line) for line in [machine(), *rows(given.rounds)]]
    print("\n".join(lines[1:]))
    if given.output is not None:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
