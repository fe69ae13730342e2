"""Steps of one stage over contexts of any length, which nobody has to compute first."""

import random
import time
from pathlib import Path

import torch

from magnetar.cluster.search.cost import ModelCost, model_cost
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.serve.engine.stage import Stage
from magnetar.serve.engine.step import StepPlan, StepRow
from magnetar.settings import KV_BLOCK_TOKENS

MOST_TOKENS = 16 * 8192
"""In use at a time."""
_NOISE = 1 << 20


class HalfStage:
    """The first of two stages of a model, whose keys and values are noise.

    A step takes as long whatever they say. The blocks of a sequence lie anywhere, as they do once
    requests have come and gone.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        facts = read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())
        self.cost: ModelCost = model_cost(facts.config, facts.index, "bf16")
        self.num_layers = facts.config.n_layers // 2
        self._vocab_size = facts.config.vocab_size
        num_blocks = MOST_TOKENS // KV_BLOCK_TOKENS
        self._stage = Stage.load(
            config=facts.config,
            source=FileTensorSource(folder, facts.index),
            first_layer=0,
            end_layer=self.num_layers,
            has_embeddings=True,
            has_output=False,
            dtype=dtype,
            device="cpu",
            num_kv_blocks=num_blocks,
        )
        noise = (torch.randn(_NOISE) * 0.3).bfloat16()
        for cache in self._stage._caches.values():
            for part in (cache.keys, cache.values):
                for piece in torch.split(part.view(-1), _NOISE):
                    piece.copy_(noise[: len(piece)])
        self._draw = random.Random(0)
        self._blocks = list(range(num_blocks))
        self._draw.shuffle(self._blocks)
        self._next_request = 0

    def seconds(self, sequences: int, tokens: int, position: int, steps: int) -> list[float]:
        """Of steps with so many tokens of each sequence, all of them at the same position."""
        requests = range(self._next_request, self._next_request + sequences)
        self._next_request += sequences
        each = -(-(position + tokens) // KV_BLOCK_TOKENS)
        found = []
        for number in range(steps + 1):
            rows = tuple(
                StepRow(
                    request_id=request,
                    position=position,
                    token_ids=tuple(self._draw.randrange(self._vocab_size) for _ in range(tokens)),
                    new_block_ids=tuple(self._blocks[at * each : (at + 1) * each])
                    if not number
                    else (),
                )
                for at, request in enumerate(requests)
            )
            began = time.perf_counter()
            self._stage.step(StepPlan(step_id=number, rows=rows), None)
            found.append(time.perf_counter() - began)
        for request in requests:
            self._stage._tables.pop(request)
        return found[1:]
