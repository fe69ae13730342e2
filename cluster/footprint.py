"""What a model weighs: bytes of its layers, its two ends, its keys and values, and a stage's own.

Every term is bytes at the compute dtype, from the true shapes of the tensor index. Of a model in
8 or 4 bits the large matrices are so held (`matrix_format`), and the rest is bf16.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..fetcher.config import ModelConfig
from ..fetcher.tensors import DTYPE_BYTES, TensorIndex
from .machines import ComputeDtype

PROCESS_BYTES = 256 << 20
"""A stage before its first weight: interpreter, torch, Ray worker (174 MB measured), and slack."""
QUANT_GROUP = 32
"""Neighbouring inputs of a rounded matrix that share a scale, and but for 8 bits a zero too: a
byte each, besides four bytes for every output."""
HeldForm = ComputeDtype | Literal["int5"]
"""How a tensor is held."""
_ROUNDED_BITS: Mapping[str, int] = {"int8": 8, "int5": 5, "int4": 4}
STEP_TOKENS = 512
"""Tokens of one step that activations are sized for; at least the engine's token budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Memory of one model at one dtype."""

    layer_bytes: tuple[int, ...]
    """Weights of each layer."""
    embeddings_bytes: int
    """On the first stage, besides its layers."""
    output_bytes: int
    """Final norm and output head, on the last stage; a tied head counts again."""
    kv_bytes_per_token: int
    """Keys and values of one token in one layer."""
    activation_bytes: int
    """The largest step's hidden states, expert intermediates and logits."""
    largest_tensor_bytes: int
    """Read buffer while loading, in the stored dtype."""

    @property
    def weights_bytes(self) -> int:
        """The whole model."""
        return sum(self.layer_bytes) + self.embeddings_bytes + self.output_bytes

    def workspace_bytes(self, context_tokens: int) -> int:
        """What a stage needs whatever its layers: its process, buffers, one gathered sequence."""
        return (
            PROCESS_BYTES
            + self.activation_bytes
            + self.largest_tensor_bytes
            + context_tokens * self.kv_bytes_per_token
        )


def matrix_format(name: str, shape: tuple[int, ...], dtype: ComputeDtype) -> HeldForm:
    """How a tensor of the checkpoint is held in a model of this dtype.

    In 8 or 4 bits are attention, experts and the output head. Beside 4 bits the head has 5: with 4
    too, the perplexity of the demo's model rose by 7 % and not by 3.
    Matrices whose inputs do not come in whole groups stay bf16.
    """
    if dtype not in ("int8", "int4"):
        return dtype
    part = name.removesuffix(".weight").rpartition(".")[2]
    if len(shape) != 2 or part in ("tok_embeddings", "gate") or shape[1] % QUANT_GROUP:
        return "bf16"
    return "int5" if (part, dtype) == ("output", "int4") else dtype


def held_bytes(name: str, shape: tuple[int, ...], dtype: ComputeDtype) -> int:
    """Memory of a tensor of the checkpoint in a model of this dtype, its scales included."""
    return form_bytes(matrix_format(name, shape, dtype), shape)


def form_bytes(form: HeldForm, shape: tuple[int, ...]) -> int:
    """Memory of a tensor held so; in 8, 5 and 4 bits of a matrix [N, K], K in whole groups."""
    num_values = math.prod(shape)
    if form not in _ROUNDED_BITS:
        return num_values * DTYPE_BYTES[form]
    group_bytes = QUANT_GROUP * _ROUNDED_BITS[form] // 8 + (1 if form == "int8" else 2)
    return num_values // QUANT_GROUP * group_bytes + 4 * shape[0]


def stored_dtype(index: TensorIndex) -> ComputeDtype:
    """The dtype that holds most of the checkpoint's bytes."""
    held: Counter[ComputeDtype] = Counter()
    for entry in index:
        held[entry.dtype] += entry.num_bytes
    return max(sorted(held), key=lambda dtype: held[dtype])


def footprint(config: ModelConfig, index: TensorIndex, dtype: ComputeDtype) -> Footprint:
    """Weigh a model as it will be held: every tensor of `index` as `held_bytes` says."""
    item_bytes = DTYPE_BYTES.get(dtype, 2)
    layers = [0] * config.n_layers
    embeddings = output = 0
    for entry in index:
        head, _, rest = entry.name.partition(".")
        if head == "layers":
            layers[int(rest.partition(".")[0])] += held_bytes(entry.name, entry.shape, dtype)
        elif head == "tok_embeddings":
            embeddings += held_bytes(entry.name, entry.shape, dtype)
        else:
            output += held_bytes(entry.name, entry.shape, dtype)
    experts_per_token = max(config.num_experts_per_tok, 1)
    return Footprint(
        layer_bytes=tuple(layers),
        embeddings_bytes=embeddings,
        output_bytes=output,
        kv_bytes_per_token=config.kv_values_per_token * item_bytes,
        activation_bytes=STEP_TOKENS
        * 4
        * (8 * config.dim + 3 * experts_per_token * config.hidden_dim + config.vocab_size),
        largest_tensor_bytes=max(entry.num_bytes for entry in index),
    )
