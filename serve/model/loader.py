"""From the tensors of a release to the layers of one stage.

Every weight is read once and cast straight into its final place, so that beside the finished
weights at most one tensor is in memory. Each stage reads only its own tensors, and accounts for
all of them: what is missing, has another shape, or belongs to no part of the model is an error.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from ...errors import CheckpointError
from ...fetcher.config import ModelConfig
from ...fetcher.tensors import TensorSource
from .attention import Attention
from .feed_forward import FeedForward
from .moe import MoeLayer
from .transformer import Transformer, TransformerLayer

COMPUTE_DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def load_transformer(
    config: ModelConfig,
    source: TensorSource,
    *,
    first_layer: int,
    end_layer: int,
    has_embeddings: bool,
    has_output: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[Transformer, int]:
    """The layers ``first_layer .. end_layer`` and the bytes that their weights occupy.

    Blocks on the disk. `on_layer` hears, after each layer and each of the outer parts, the bytes
    loaded so far, counted in the compute dtype.

    Raises:
        CheckpointError: a tensor is missing, surplus, of another shape, or beyond fp16.
    """
    loader = _Loader(config, source, dtype, device)
    _refuse_surplus(config, source, range(first_layer, end_layer))

    def told(loaded_bytes: int) -> None:
        if on_layer is not None:
            on_layer(loaded_bytes)

    tok_embeddings = norm = output = None
    vocab_shape = (config.vocab_size, config.dim)
    if has_embeddings:
        tok_embeddings = loader.read("tok_embeddings.weight", vocab_shape)
        told(loader.loaded_bytes)
    layers = {}
    for layer_id in range(first_layer, end_layer):
        layers[layer_id] = loader.layer(layer_id)
        told(loader.loaded_bytes)
    if has_output:
        norm = loader.read("norm.weight", (config.dim,))
        if tok_embeddings is not None and _is_tied(source):
            output = tok_embeddings
        else:
            output = loader.read("output.weight", vocab_shape)
        told(loader.loaded_bytes)
    transformer = Transformer(
        config, layers=layers, tok_embeddings=tok_embeddings, norm=norm, output=output
    )
    return transformer, loader.loaded_bytes


class _Loader:
    """Reads, checks, casts and stacks."""

    def __init__(
        self, config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.source = source
        self.dtype = dtype
        self.device = device
        self.loaded_bytes = 0

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor as a weight of its own."""
        # A freshly allocated tensor of the right dtype and device is taken as it is.
        weight = self._stored(name, shape).to(self.device, self.dtype)
        self._check_range(name, weight)
        self.loaded_bytes += weight.nbytes
        return weight

    def stack(self, parts: Iterable[tuple[str, tuple[int, int]]]) -> torch.Tensor:
        """Matrices of equal width, one above the other, in one weight."""
        parts = list(parts)
        num_rows = sum(shape[0] for _, shape in parts)
        weight = self._empty(num_rows, parts[0][1][1])
        self._fill(weight, parts)
        return weight

    def layer(self, layer_id: int) -> TransformerLayer:
        """One whole layer."""
        config = self.config
        dim, head_dim, prefix = config.dim, config.head_dim, f"layers.{layer_id}"
        q_shape = (config.n_heads * head_dim, dim)
        kv_shape = (config.n_kv_heads * head_dim, dim)
        attention = Attention(
            config,
            wqkv=self.stack(
                (f"{prefix}.attention.{part}.weight", shape)
                for part, shape in (("wq", q_shape), ("wk", kv_shape), ("wv", kv_shape))
            ),
            wo=self.read(f"{prefix}.attention.wo.weight", (q_shape[1], q_shape[0])),
        )
        feed_forward = (
            self._moe_layer(f"{prefix}.feed_forward")
            if config.is_moe
            else self._feed_forward(f"{prefix}.feed_forward")
        )
        return TransformerLayer(
            config,
            attention=attention,
            feed_forward=feed_forward,
            attention_norm=self.read(f"{prefix}.attention_norm.weight", (dim,)),
            ffn_norm=self.read(f"{prefix}.ffn_norm.weight", (dim,)),
        )

    def _feed_forward(self, prefix: str) -> FeedForward:
        dim, hidden_dim = self.config.dim, self.config.hidden_dim
        return FeedForward(
            w13=self.stack((f"{prefix}.{part}.weight", (hidden_dim, dim)) for part in ("w1", "w3")),
            w2=self.read(f"{prefix}.w2.weight", (dim, hidden_dim)),
        )

    def _moe_layer(self, prefix: str) -> MoeLayer:
        config = self.config
        dim, hidden_dim, num_experts = config.dim, config.hidden_dim, config.num_experts
        w13 = self._empty(num_experts, 2 * hidden_dim, dim)
        w2 = self._empty(num_experts, dim, hidden_dim)
        for expert in range(num_experts):
            name = f"{prefix}.experts.{expert}"
            self._fill(
                w13[expert], [(f"{name}.{part}.weight", (hidden_dim, dim)) for part in ("w1", "w3")]
            )
            self._fill(w2[expert], [(f"{name}.w2.weight", (dim, hidden_dim))])
        gate = self.read(f"{prefix}.gate.weight", (num_experts, dim))
        return MoeLayer(config, gate=gate, w13=w13, w2=w2)

    def _empty(self, *shape: int) -> torch.Tensor:
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.loaded_bytes += weight.nbytes
        return weight

    def _fill(self, weight: torch.Tensor, parts: list[tuple[str, tuple[int, int]]]) -> None:
        row = 0
        for name, shape in parts:
            target = weight[row : row + shape[0]]
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
