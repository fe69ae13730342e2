"""From the tensors of a release to the layers of one stage.

Every weight is read once, cast straight into its matrix, and packed as soon as that is whole, so
that beside the finished weights at most one matrix is in memory. Each stage reads only its own
tensors, and accounts for all of them: what is missing, has another shape, or belongs to no part
of the model is an error.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from ...cluster.footprint import held_bytes, matrix_format
from ...cluster.machines import ComputeDtype
from ...errors import CheckpointError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorSource
from .attention import Attention, attend_at_once
from .feed_forward import FeedForward
from .invariant import attend_in_stretches, invariant_kernel, invariant_silu
from .linear import LINEAR_KERNELS, Linear, LinearKernel, WeightFormat, default_linear_kernel
from .moe import Experts, ExpertsKind, GroupedExperts, LoopExperts, MoeLayer, default_experts_kind
from .spread import HeldExperts, SpreadExperts
from .transformer import Transformer, TransformerLayer

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.bfloat16,
    "int4": torch.bfloat16,
}
"""What is computed in, by the dtype of a stage; int8 and int4 are of the weights only."""

LayerExperts = Mapping[int, Sequence[int]]
"""By layer (global ids), the ids of experts."""
_Part = tuple[str, tuple[int, int]]
"""Name and shape of a matrix."""


def load_transformer(
    config: ModelConfig,
    source: TensorSource,
    *,
    first_layer: int,
    end_layer: int,
    has_embeddings: bool,
    has_output: bool,
    dtype: ComputeDtype,
    device: torch.device,
    batch_invariant: bool = False,
    held_experts: LayerExperts | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[Transformer, int]:
    """The layers ``first_layer .. end_layer`` and the bytes that their weights occupy.

    With `batch_invariant` the bits of a token do not depend on what is computed beside it.
    Blocks on the disk. `held_experts` has the layers whose experts are spread over hosts, each
    with the ids of those to hold here; such a layer is to be told where the others are
    (`SpreadExperts.join`). `on_layer` hears, after each layer and each of the outer parts, the
    bytes loaded so far, as they are held.

    Raises:
        CheckpointError: a tensor is missing, surplus, of another shape, or beyond fp16.
        PreflightError: this machine cannot compute so that it is `batch_invariant`.
    """
    loader = _Loader(config, source, dtype, device, held_experts or {}, batch_invariant)
    _refuse_surplus(config, source, range(first_layer, end_layer))

    def told(loaded_bytes: int) -> None:
        if on_layer is not None:
            on_layer(loaded_bytes)

    tok_embeddings = norm = output = None
    vocab_shape = (config.vocab_size, config.dim)
    if has_embeddings:
        tok_embeddings = loader.tensor("tok_embeddings.weight", vocab_shape)
        told(loader.loaded_bytes)
    layers = {}
    for layer_id in range(first_layer, end_layer):
        layers[layer_id] = loader.layer(layer_id)
        told(loader.loaded_bytes)
    if has_output:
        norm = loader.tensor("norm.weight", (config.dim,))
        if tok_embeddings is not None and loader.keeps_weights and _is_tied(source):
            output = loader.kernel("plain")(tok_embeddings)
        else:
            output = loader.linear(("output.weight", vocab_shape))
        told(loader.loaded_bytes)
    transformer = Transformer(
        config, layers=layers, tok_embeddings=tok_embeddings, norm=norm, output=output
    )
    return transformer, loader.loaded_bytes


def load_experts(
    config: ModelConfig,
    source: TensorSource,
    experts: LayerExperts,
    *,
    dtype: ComputeDtype,
    device: torch.device,
    batch_invariant: bool = False,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[dict[int, HeldExperts], int]:
    """Some experts of some layers, without anything else of these, and their bytes.

    As `load_transformer` in all else.
    """
    loader = _Loader(config, source, dtype, device, experts, batch_invariant)
    layers = {}
    for layer_id, ids in experts.items():
        layers[layer_id] = loader.held_experts(layer_id, ids)
        if on_layer is not None:
            on_layer(loader.loaded_bytes)
    return layers, loader.loaded_bytes


class _Loader:
    """Reads, checks, casts, stacks and packs."""

    def __init__(
        self,
        config: ModelConfig,
        source: TensorSource,
        dtype: ComputeDtype,
        device: torch.device,
        spread: LayerExperts,
        batch_invariant: bool,
    ) -> None:
        self.config = config
        self.source = source
        self.held_dtype: ComputeDtype = dtype
        self.dtype = COMPUTE_DTYPES[dtype]
        self.device = device
        self.spread = spread
        self.batch_invariant = batch_invariant
        self.loaded_bytes = 0
        self.keeps_weights = self._kernel_name("output.weight", (1, 1)) == "plain"
        """Whether the output head uses the weight itself, not a copy of it."""
        self._experts_kind: ExpertsKind = "loop"
        if dtype not in ("int8", "int4") and not batch_invariant:
            self._experts_kind = default_experts_kind(dtype=self.dtype, device=device)

    def kernel(self, name: str) -> LinearKernel:
        """The kernel of that name, in the way that is asked for."""
        if self.batch_invariant:
            return invariant_kernel(name, self.device)
        return LINEAR_KERNELS[name]

    def _kernel_name(self, name: str, shape: tuple[int, int]) -> str:
        """Which kernel multiplies with a matrix of the checkpoint."""
        form = matrix_format(name, shape, self.held_dtype)
        weights: WeightFormat = form if form in ("int8", "int5", "int4") else "float"
        return default_linear_kernel(dtype=self.dtype, device=self.device, weights=weights)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor as it is, but for dtype and device."""
        # A freshly allocated tensor that has both already is taken without a copy.
        weight = self._stored(name, shape).to(self.device, self.dtype)
        self._check_range(name, weight)
        self.loaded_bytes += weight.nbytes
        return weight

    def linear(self, *parts: _Part) -> Linear:
        """Matrices of equal width, one above the other, as one matrix to multiply with."""
        before = self.loaded_bytes
        if len(parts) == 1:
            weight = self.tensor(*parts[0])
        else:
            weight = self._empty(sum(shape[0] for _, shape in parts), parts[0][1][1])
            self._fill(weight, *parts)
        linear = self.kernel(self._kernel_name(*parts[0]))(weight)
        self.loaded_bytes = before + sum(held_bytes(*part, self.held_dtype) for part in parts)
        return linear

    def layer(self, layer_id: int) -> TransformerLayer:
        """One whole layer."""
        config = self.config
        dim, head_dim, prefix = config.dim, config.head_dim, f"layers.{layer_id}"
        q_shape = (config.n_heads * head_dim, dim)
        kv_shape = (config.n_kv_heads * head_dim, dim)
        attention = Attention(
            config,
            wqkv=self.linear(
                (f"{prefix}.attention.wq.weight", q_shape),
                (f"{prefix}.attention.wk.weight", kv_shape),
                (f"{prefix}.attention.wv.weight", kv_shape),
            ),
            wo=self.linear((f"{prefix}.attention.wo.weight", (q_shape[1], q_shape[0]))),
            attend=attend_in_stretches if self.batch_invariant else attend_at_once,
        )
        feed_forward: FeedForward | MoeLayer
        if config.is_moe:
            gate_shape = (config.num_experts, dim)
            feed_forward = MoeLayer(
                config,
                gate=self._gate(self.tensor(f"{prefix}.feed_forward.gate.weight", gate_shape)),
                experts=self._experts(layer_id),
            )
        else:
            feed_forward = self._feed_forward(f"{prefix}.feed_forward")
        return TransformerLayer(
            config,
            attention=attention,
            feed_forward=feed_forward,
            attention_norm=self.tensor(f"{prefix}.attention_norm.weight", (dim,)),
            ffn_norm=self.tensor(f"{prefix}.ffn_norm.weight", (dim,)),
        )

    def _gate(self, weight: torch.Tensor) -> Linear:
        # So few rows that calling a packed matrix costs more than it saves (12 us to 4); `rows`
        # takes a quarter of the time of `plain`.
        name = default_linear_kernel(dtype=self.dtype, device=self.device)
        return self.kernel(name if name == "rows" else "plain")(weight)

    def _feed_forward(self, prefix: str) -> FeedForward:
        """A dense layer or one expert."""
        w13, w2 = self._parts(prefix)
        silu = invariant_silu if self.batch_invariant else F.silu
        return FeedForward(w13=self.linear(*w13), w2=self.linear(w2), silu=silu)

    def held_experts(self, layer_id: int, ids: Sequence[int]) -> HeldExperts:
        """Some experts of a layer."""
        return HeldExperts(ids, self._stacked(layer_id, ids))

    def _experts(self, layer_id: int) -> Experts:
        num_experts = self.config.num_experts
        if layer_id not in self.spread:
            return self._stacked(layer_id, range(num_experts))
        held = self.held_experts(layer_id, self.spread[layer_id])
        return SpreadExperts(layer_id, num_experts=num_experts, held=held)

    def _stacked(self, layer_id: int, ids: Sequence[int]) -> Experts:
        config = self.config
        names = [f"layers.{layer_id}.feed_forward.experts.{expert}" for expert in ids]
        if self._experts_kind == "loop":
            return LoopExperts([self._feed_forward(name) for name in names])
        stacked_w13 = self._empty(len(names), 2 * config.hidden_dim, config.dim)
        stacked_w2 = self._empty(len(names), config.dim, config.hidden_dim)
        for name, w13_FC, w2_CI in zip(names, stacked_w13, stacked_w2, strict=True):
            w13, w2 = self._parts(name)
            self._fill(w13_FC, *w13)
            self._fill(w2_CI, w2)
        return GroupedExperts(w13=stacked_w13, w2=stacked_w2)

    def _parts(self, prefix: str) -> tuple[list[_Part], _Part]:
        """What lies in `w13`, and `w2`, of one gated network."""
        dim, hidden_dim = self.config.dim, self.config.hidden_dim
        w13 = [(f"{prefix}.{part}.weight", (hidden_dim, dim)) for part in ("w1", "w3")]
        return w13, (f"{prefix}.w2.weight", (dim, hidden_dim))

    def _empty(self, *shape: int) -> torch.Tensor:
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.loaded_bytes += weight.nbytes
        return weight

    def _fill(self, weight: torch.Tensor, *parts: _Part) -> None:
        row = 0
        for name, shape in parts:
            target = weight.narrow(0, row, shape[0])
            target.copy_(self._stored(name, shape))
            self._check_range(name, target)
            row += shape[0]

    def _stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.source.index:
            raise CheckpointError(
                f"the release has no tensor {name}, which this model needs; compare its files "
                "with the publisher's"
            )
        stored = self.source.read(name)
        if tuple(stored.shape) != shape:
            raise CheckpointError(
                f"{name} has the shape {list(stored.shape)}, but the model's parameters ask for "
                f"{list(shape)}; the weights and the parameter file are not of one release"
            )
        return stored

    def _check_range(self, name: str, weight: torch.Tensor) -> None:
        if self.dtype is torch.float16 and not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} holds values beyond the range of fp16 (65504); load it as bf16 or fp32"
            )


def _is_tied(source: TensorSource) -> bool:
    """Whether the output head is the very bytes of the embeddings."""
    if "output.weight" not in source.index or "tok_embeddings.weight" not in source.index:
        return False
    output, embeddings = source.index["output.weight"], source.index["tok_embeddings.weight"]
    return (output.file, output.offset) == (embeddings.file, embeddings.offset)


def _refuse_surplus(config: ModelConfig, source: TensorSource, layers: range) -> None:
    """Every name must belong to the model; those of other stages' layers are left to them."""
    if config.is_moe:
        experts = [
            f"experts.{e}.{w}" for e in range(config.num_experts) for w in ("w1", "w2", "w3")
        ]
        feed_forward = ["gate", *experts]
    else:
        feed_forward = ["w1", "w2", "w3"]
    known = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for layer_id in layers:
        prefix = f"layers.{layer_id}"
        known.update(f"{prefix}.attention.{part}.weight" for part in ("wq", "wk", "wv", "wo"))
        known.update(f"{prefix}.{part}.weight" for part in ("attention_norm", "ffn_norm"))
        known.update(f"{prefix}.feed_forward.{part}.weight" for part in feed_forward)
    others = tuple(f"layers.{n}." for n in range(config.n_layers) if n not in layers)
    surplus = [
        entry.name
        for entry in source.index
        if entry.name not in known and not entry.name.startswith(others)
    ]
    if surplus:
        raise CheckpointError(
            f"{len(surplus)} tensors belong to no part of the model, the first is {surplus[0]}; "
            "this release is of another architecture"
        )
