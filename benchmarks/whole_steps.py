"""Steps of a stage over contexts of any length, which nobody has to compute first."""

import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from magnetar.cluster.inventory.pieces import lower_quartile
from magnetar.cluster.machines import ComputeDtype
from magnetar.cluster.search.cost import (
    ModelCost,
    Speed,
    chunk_context,
    layer_s,
    model_cost,
    prefill_layer_s,
)
from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.serve.engine.stage import Stage
from magnetar.serve.engine.step import StepPlan, StepRow
from magnetar.settings import KV_BLOCK_TOKENS

MOST_TOKENS = 16 * 8192
"""In use at a time."""
_NOISE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeStep:
    """What a step has to compute: so many tokens of each sequence, all at the same position."""

    sequences: int = 1
    tokens: int = 1
    position: int
    count: int = 1
    """How often it is measured in a round."""

    @property
    def name(self) -> str:
        """Sequences and their context, or a chunk and where it begins."""
        if self.tokens == 1:
            return f"{self.sequences}-of-{self.position + 1}"
        return f"{self.tokens}-at-{self.position}"

    def layer_s(self, cost: ModelCost, speed: Speed) -> float:
        """One layer of it, as the planner says."""
        if self.tokens == 1:
            return layer_s(cost, 0, speed, tokens=self.sequences, context_tokens=self.position + 1)
        seen = chunk_context(self.position, self.tokens)
        return prefill_layer_s(cost, 0, speed, tokens=self.tokens, context_tokens=seen)


WHOLE_STEPS: Mapping[str, Sequence[WholeStep]] = {
    "contexts": [
        WholeStep(sequences=sequences, position=context - 1, count=8)
        for sequences, context in itertools.product((1, 4, 16), (64, 1024, 4096, 8192))
    ],
    "chunks": [
        WholeStep(tokens=tokens, position=position)
        for tokens, position in itertools.product((128, 256, 512), (0, 2048, 7680))
    ],
}


class FirstLayers:
    """The first layers of a model, whose keys and values are noise.

    A step takes as long whatever they say. The blocks of a sequence lie anywhere, as they do once
    requests have come and gone.
    """

    def __init__(self, folder: Path, dtype: ComputeDtype, *, num_layers: int) -> None:
        facts = read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())
        self.cost = model_cost(facts.config, facts.index, dtype)
        self.num_layers = num_layers
        self._vocab_size = facts.config.vocab_size
        num_blocks = MOST_TOKENS // KV_BLOCK_TOKENS
        self._stage = Stage.load(
            config=facts.config,
            source=FileTensorSource(folder, facts.index),
            first_layer=0,
            end_layer=num_layers,
            has_embeddings=True,
            has_output=False,
            dtype=dtype,
            device="cpu",
            num_kv_blocks=num_blocks,
        )
        noise = torch.randn(_NOISE) * 0.3
        for cache in self._stage._caches.values():
            for part in (cache.keys, cache.values):
                for piece in torch.split(part.view(-1), _NOISE):
                    piece.copy_(noise[: len(piece)])
        self._draw = random.Random(0)
        self._blocks = list(range(num_blocks))
        self._draw.shuffle(self._blocks)
        self._next_request = 0

    def seconds(self, step: WholeStep) -> float:
        """Of a step, the lower quartile of those that follow one another without a pause: a team of
        threads that slept may wake on one processor, and takes twice as long until they part."""
        requests = range(self._next_request, self._next_request + step.sequences)
        self._next_request += step.sequences
        each = -(-(step.position + step.tokens) // KV_BLOCK_TOKENS)
        blocks = {
            request: tuple(self._blocks[at * each : (at + 1) * each])
            for at, request in enumerate(requests)
        }
        found = []
        for number in range(step.count):
            rows = tuple(
                StepRow(
                    request_id=request,
                    position=step.position,
                    token_ids=tuple(
                        self._draw.randrange(self._vocab_size) for _ in range(step.tokens)
                    ),
                    new_block_ids=() if number else blocks[request],
                )
                for request in requests
            )
            began = time.perf_counter()
            self._stage.step(StepPlan(step_id=number, rows=rows), None)
            found.append(time.perf_counter() - began)
        self._stage.step(StepPlan(step_id=step.count, rows=(), released=tuple(requests)), None)
        return lower_quartile(found)
