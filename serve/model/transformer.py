"""Consecutive layers of the model, with the embeddings before and the output head after them.

Attributes are named as in the checkpoint, and layers are keyed by their id in the whole model.

Shapes: T tokens of the step, S tokens whose successor is sampled, C model width, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F

from ...fetcher.config import ModelConfig
from .attention import Attention
from .batch import Batch
from .feed_forward import FeedForward
from .fused import FusedParts, Part
from .kv_cache import KVCache
from .linear import Linear
from .moe import MoeLayer
from .norm import rms_norm
from .parts import attention_part, feed_forward_part


class TransformerLayer:
    """Attention and feed-forward network, each on the normalised input and added to it."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: Attention,
        feed_forward: FeedForward | MoeLayer,
        attention_norm: torch.Tensor,
        ffn_norm: torch.Tensor,
    ) -> None:
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = attention_norm
        self.ffn_norm = ffn_norm
        self.norm_eps = config.norm_eps
        self.compiled = (
            attention_part(attention, config, attention_norm, config.norm_eps),
            feed_forward_part(feed_forward, ffn_norm, config.norm_eps),
        )
        """Both as compiled functions compute them, where they can."""

    def attend(self, x_TC: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """[T, C]; writes the step's keys and values into the cache."""
        normed_TC = rms_norm(x_TC, self.attention_norm, self.norm_eps)
        return x_TC + self.attention.forward(normed_TC, batch, cache)

    def feed(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C]"""
        return x_TC + self.feed_forward.forward(rms_norm(x_TC, self.ffn_norm, self.norm_eps))


Run = Callable[[torch.Tensor, Batch, Mapping[int, KVCache]], torch.Tensor]
"""What takes hidden states [T, C] some way through the layers."""


def runs_of(layers: Mapping[int, TransformerLayer]) -> Iterator[Run]:
    """All parts of the layers in order; neighbours that can be compiled are one."""
    compiled: list[tuple[int, Part]] = []
    for layer_id, layer in layers.items():
        by_steps = functools.partial(_attend, layer, layer_id), functools.partial(_feed, layer)
        for part, run in zip(layer.compiled, by_steps, strict=True):
            if part is not None:
                compiled.append((layer_id, part))
                continue
            if compiled:
                yield FusedParts(compiled).forward
                compiled = []
            yield run
    if compiled:
        yield FusedParts(compiled).forward


def _attend(
    layer: TransformerLayer,
    layer_id: int,
    x_TC: torch.Tensor,
    batch: Batch,
    caches: Mapping[int, KVCache],
) -> torch.Tensor:
    return layer.attend(x_TC, batch, caches[layer_id])


def _feed(
    layer: TransformerLayer, x_TC: torch.Tensor, _: Batch, __: Mapping[int, KVCache]
) -> torch.Tensor:
    return layer.feed(x_TC)


class Transformer:
    """The part of a model that one stage holds."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: Mapping[int, TransformerLayer],
        tok_embeddings: torch.Tensor | None,
        norm: torch.Tensor | None,
        output: Linear | None,
    ) -> None:
        self.config = config
        self.layers = layers
        """By global id, in order."""
        self.tok_embeddings = tok_embeddings
        """[V, C] on the first stage, else None."""
        self.norm = norm
        """[C] on the last stage, else None."""
        self.output = output
        """C -> V on the last stage, else None."""
        self._runs = tuple(runs_of(layers))

    def embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, C] of token ids; first stage only."""
        assert self.tok_embeddings is not None
        return F.embedding(tokens_T, self.tok_embeddings)

    def forward(
        self, hidden_TC: torch.Tensor, batch: Batch, caches: Mapping[int, KVCache]
    ) -> torch.Tensor:
        """Hidden states [T, C] after this part's layers; writes their caches."""
        for run in self._runs:
            hidden_TC = run(hidden_TC, batch, caches)
        return hidden_TC

    def logits(self, hidden_SC: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] in the compute dtype; last stage only."""
        assert self.norm is not None
        assert self.output is not None
        return self.output(rms_norm(hidden_SC, self.norm, self.config.norm_eps))
