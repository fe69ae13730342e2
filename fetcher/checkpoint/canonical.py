"""From the names in a weights file to canonical names, every one of them accounted for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from ...errors import CheckpointError, ReleaseError
from ..config import ModelConfig
from ..tensors import TensorEntry, TensorIndex
from .fused import is_fused, slice_name, split_experts
from .stored_tensor import StoredTensor, some

Naming = Literal["mistral", "fused", "huggingface"]

MAX_TENSORS: Final = 200_000

_MARKERS: Final[Mapping[Naming, str]] = {
    "mistral": "tok_embeddings.weight",
    "huggingface": "model.embed_tokens.weight",
}
_DERIVED_SUFFIX: Final = ".rotary_emb.inv_freq"
"""Old conversions store these frequencies; they follow from rope_theta."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpectedTensor:
    """A tensor that the model needs."""

    name: str
    """Canonical."""
    huggingface_name: str
    shape: tuple[int, ...]
    rotary_heads: int = 0
    """Heads of a q or k projection, whose row order depends on the naming."""
    fused_name: str = ""
    """Where the naming with fused experts differs from the canonical one."""
    fused_is_transposed: bool = False

    def name_in(self, naming: Naming) -> str:
        """What a file of that naming calls it."""
        if naming == "huggingface":
            return self.huggingface_name
        return (self.fused_name or self.name) if naming == "fused" else self.name


def detect_naming(names: Iterable[str]) -> Naming:
    """Whose names these are.

    Raises:
        CheckpointError: nobody's that is known here.
    """
    held = set(names)
    if _MARKERS["mistral"] in held and any(map(is_fused, held)):
        return "fused"
    for naming, marker in _MARKERS.items():
        if marker in held:
            return naming
    raise CheckpointError(
        f"The weights have {len(held)} tensors ({some(sorted(held)) or 'none'}) and neither "
        f"{' nor '.join(_MARKERS.values())}: not a model of the Mistral family in a layout that is "
        "read here."
    )


def expected_tensors(config: ModelConfig) -> Iterator[ExpectedTensor]:
    """Every tensor of the model, in model order."""
    dim = config.dim
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

    def expect(
        name: str, huggingface_name: str, *shape: int, rotary_heads: int = 0, fused: str = ""
    ) -> ExpectedTensor:
        return ExpectedTensor(
            name=f"{name}.weight",
            huggingface_name=f"{huggingface_name}.weight",
            shape=shape,
            rotary_heads=rotary_heads,
            fused_name=fused,
            fused_is_transposed=".w2[" in fused,
        )

    yield expect("tok_embeddings", "model.embed_tokens", config.vocab_size, dim)
    for layer in range(config.n_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        attention = f"{theirs}.self_attn"
        yield expect(f"{ours}.attention_norm", f"{theirs}.input_layernorm", dim)
        yield expect(
            f"{ours}.attention.wq", f"{attention}.q_proj", queries, dim, rotary_heads=config.n_heads
        )
        yield expect(
            f"{ours}.attention.wk", f"{attention}.k_proj", keys, dim, rotary_heads=config.n_kv_heads
        )
        yield expect(f"{ours}.attention.wv", f"{attention}.v_proj", keys, dim)
        yield expect(f"{ours}.attention.wo", f"{attention}.o_proj", dim, queries)
        yield expect(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", dim)
        hidden = config.hidden_dim
        if not config.is_moe:
            yield expect(f"{ours}.feed_forward.w1", f"{theirs}.mlp.gate_proj", hidden, dim)
            yield expect(f"{ours}.feed_forward.w2", f"{theirs}.mlp.down_proj", dim, hidden)
            yield expect(f"{ours}.feed_forward.w3", f"{theirs}.mlp.up_proj", hidden, dim)
            continue
        moe = f"{theirs}.block_sparse_moe"
        gate = f"{ours}.feed_forward.gate"
        fused_gate = f"{ours}.block_sparse_moe.gate.weight"
        yield expect(gate, f"{moe}.gate", config.num_experts, dim, fused=fused_gate)
        for expert in range(config.num_experts):
            for part, shape in (
                ("w1", (hidden, dim)),
                ("w2", (dim, hidden)),
                ("w3", (hidden, dim)),
            ):
                yield expect(
                    f"{ours}.feed_forward.experts.{expert}.{part}",
                    f"{moe}.experts.{expert}.{part}",
                    *shape,
                    fused=slice_name(layer, part, expert),
                )
    yield expect("norm", "model.norm", dim)
    yield expect("output", "lm_head", config.vocab_size, dim)


def canonical_index(stored: Sequence[StoredTensor], config: ModelConfig) -> TensorIndex:
    """The index of all tensors that `config` needs, in model order.

    With tied embeddings ``output.weight`` is an entry of its own over the bytes of the embeddings.

    Raises:
        CheckpointError: a tensor is missing, unknown, there twice, or has another shape than
            `config` says.
        ReleaseError: `config` asks for an absurd number of tensors.
    """
    per_layer = 8 + 3 * max(1, config.num_experts)
    if config.n_layers * per_layer > MAX_TENSORS:
        raise ReleaseError(
            f"A model of {config.n_layers} layers with {config.num_experts} experts has more than "
            f"{MAX_TENSORS} tensors; its configuration must be wrong."
        )
    naming = detect_naming(tensor.name for tensor in stored)
    by_name: dict[str, StoredTensor] = {}
    for tensor in split_experts(stored, config.num_experts) if naming == "fused" else stored:
        if (other := by_name.setdefault(tensor.name, tensor)) is not tensor:
            raise CheckpointError(
                f"{some([tensor.name])} is in {other.file} and again in {tensor.file}."
            )
    missing: list[str] = []
    misshapen: list[str] = []
    entries: dict[str, TensorEntry] = {}
    for expected in expected_tensors(config):
        source_name = expected.name_in(naming)
        found = by_name.pop(source_name, None)
        embeddings = entries.get("tok_embeddings.weight")
        if config.tie_embeddings and expected.name == "output.weight" and embeddings:
            # Whatever copy the file may hold: tied means the embeddings.
            entries[expected.name] = replace(embeddings, name=expected.name)
            continue
        if found is None:
            missing.append(source_name)
            continue
        transposed = naming == "fused" and expected.fused_is_transposed
        shape = expected.shape[::-1] if transposed else expected.shape
        if found.shape != shape:
            misshapen.append(f"{source_name} has {found.shape} and not {shape}")
        entries[expected.name] = TensorEntry(
            name=expected.name,
            source_name=source_name,
            file=found.file,
            offset=found.offset,
            dtype=found.dtype,
            shape=expected.shape,
            transposed=transposed,
            rope_permuted_heads=expected.rotary_heads if naming == "huggingface" else 0,
        )
    unknown = [name for name in by_name if not name.endswith(_DERIVED_SUFFIX)]
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} tensors are missing ({some(missing)})")
    if unknown:
        complaints.append(f"{len(unknown)} tensors are unknown ({some(unknown)})")
    if misshapen:
        complaints.append(f"{len(misshapen)} shapes disagree ({some(misshapen)})")
    if complaints:
        raise CheckpointError(
            f"The weights do not fit the configuration ({config.n_layers} layers, "
            f"{config.num_experts} experts): {'; '.join(complaints)}. Take a complete release of "
            "one model."
        )
    return TensorIndex(entries)
