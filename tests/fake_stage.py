"""Stages without a model: the next token is a function of all tokens before it.

Each stage keeps the tokens of every request in KV blocks of its own, so a wrong block table, a
block with two owners or a lost release shows as a wrong token.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from magnetar.cluster.links.dial import dial
from magnetar.cluster.links.link import TcpLink
from magnetar.cluster.links.listener import LinkListener
from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine.engine import Engine
from magnetar.serve.engine.stage_worker import Executor, StageWorker
from magnetar.serve.engine.step import Sample, StepPlan, StepResult
from magnetar.settings import KV_BLOCK_TOKENS

VOCAB_SIZE = 1000
SECRET = b"s" * 32
GATE_TIMEOUT_S = 20.0


def next_token(token_ids: Sequence[int]) -> int:
    """The token that follows, whatever the batch."""
    return (sum((i + 1) * token for i, token in enumerate(token_ids)) + 17) % VOCAB_SIZE


def expected_tokens(prompt_ids: Sequence[int], count: int) -> list[int]:
    """The answer of that length."""
    token_ids = list(prompt_ids)
    for _ in range(count):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt_ids) :]


class FakeStage:
    """Plays `serve.stage.Stage`; hidden states carry the token ids along."""

    def __init__(self, *, num_kv_blocks: int, is_first: bool, is_last: bool) -> None:
        self._cache = [-1] * (num_kv_blocks * KV_BLOCK_TOKENS)
        self._tables: dict[int, list[int]] = {}
        self._is_first = is_first
        self._is_last = is_last
        self.fail_at_step: int | None = None
        self.largest_step = 0
        """Tokens of the largest step so far."""

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        if plan.step_id == self.fail_at_step:
            raise ValueError("the fake stage was told to fail")
        assert (hidden_TD is None) == self._is_first
        self.largest_step = max(self.largest_step, sum(len(row.token_ids) for row in plan.rows))
        known = [token for row in plan.rows for token in row.token_ids]
        if hidden_TD is not None:
            assert hidden_TD[:, 0].to(torch.int64).tolist() == known
        for request_id in plan.released:
            del self._tables[request_id]
        samples = []
        for row in plan.rows:
            table = self._tables.setdefault(row.request_id, [])
            table.extend(row.new_block_ids)
            for offset, token in enumerate(row.token_ids):
                self._cache[self._slot(table, row.position + offset)] = token
            if row.sampling is not None:
                end = row.position + len(row.token_ids)
                seen = [self._cache[self._slot(table, position)] for position in range(end)]
                samples.append(Sample(request_id=row.request_id, token_id=next_token(seen)))
        if self._is_last:
            return StepResult(step_id=plan.step_id, samples=tuple(samples))
        return torch.tensor(known, dtype=torch.float32).unsqueeze(1)

    @staticmethod
    def _slot(table: list[int], position: int) -> int:
        block, offset = divmod(position, KV_BLOCK_TOKENS)
        return table[block] * KV_BLOCK_TOKENS + offset


class GatedStage(FakeStage):
    """Computes nothing until the gate opens."""

    def __init__(self, *, num_kv_blocks: int, is_first: bool, is_last: bool) -> None:
        super().__init__(num_kv_blocks=num_kv_blocks, is_first=is_first, is_last=is_last)
        self.gate = threading.Event()

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor | StepResult:
        assert self.gate.wait(GATE_TIMEOUT_S)
        return super().step(plan, hidden_TD)


def fake_stages(num_stages: int, *, num_kv_blocks: int) -> list[FakeStage]:
    """A whole pipeline."""
    return [
        FakeStage(num_kv_blocks=num_kv_blocks, is_first=index == 0, is_last=index == num_stages - 1)
        for index in range(num_stages)
    ]


def linked_pair() -> tuple[TcpLink, TcpLink]:
    """Both ends of a real link on loopback: the one that dialled and the one that accepted."""
    listener = LinkListener(host="127.0.0.1", secret=SECRET, deployment="test", epoch=0)
    with _dialled(listener.address) as dialled:
        accepted = listener.accept(5.0)
    listener.close()
    return dialled[0], accepted


@contextmanager
def _dialled(address: str) -> Iterator[list[TcpLink]]:
    links: list[TcpLink] = []

    def run() -> None:
        links.append(dial(address, secret=SECRET, deployment="test", epoch=0, timeout_s=5.0))

    thread = threading.Thread(target=run)
    thread.start()
    yield links
    thread.join()


def model_config() -> ModelConfig:
    """Sizes that the fake stages do not look at, but for the vocabulary."""
    return ModelConfig(
        dim=1,
        n_layers=1,
        head_dim=1,
        hidden_dim=1,
        n_heads=1,
        n_kv_heads=1,
        norm_eps=1e-5,
        vocab_size=VOCAB_SIZE,
        rope_theta=1e4,
        max_context_tokens=1024,
    )


@contextmanager
def running_engine(
    stages: Sequence[Executor],
    *,
    num_kv_blocks: int,
    eos_token_ids: frozenset[int] = frozenset(),
    config: ModelConfig | None = None,
    max_running: int = 64,
    max_waiting: int = 256,
    max_step_tokens: int | None = None,
) -> Iterator[tuple[Engine, list[StageWorker]]]:
    """An engine and its stages on real links; everything is stopped at the end."""
    pairs = [linked_pair() for _ in range(len(stages) + 1)]
    workers = [
        StageWorker(
            stage,
            upstream=pairs[index][1],
            downstream=pairs[index + 1][0],
            expert_tokens=getattr(stage, "expert_tokens", None),
        )
        for index, stage in enumerate(stages)
    ]
    engine = Engine(
        config=config or model_config(),
        num_kv_blocks=num_kv_blocks,
        max_context_tokens=1024,
        max_running=max_running,
        max_waiting=max_waiting,
        max_step_tokens=max_step_tokens,
        num_stages=len(stages),
        downstream=pairs[0][0],
        upstream=pairs[-1][1],
        eos_token_ids=eos_token_ids,
    )
    for worker in workers:
        worker.start()
    engine.start()
    try:
        yield engine, workers
    finally:
        engine.stop()
        for worker in workers:
            worker.stop()
