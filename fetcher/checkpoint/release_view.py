"""What a release is, for people (a table) and for programs (a JSON object)."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..tensors import DTYPE_BYTES, TensorEntry
from .release import ReleaseFacts

GROUPS = ("embeddings", "attention", "router", "experts", "feed-forward", "norms", "output")
_MAX_FILES = 8
"""Shards that a table lists; JSON has all."""


def release_json(facts: ReleaseFacts) -> dict[str, Any]:
    """Facts and sums over the tensor index; amounts are bytes and counts."""
    parameters = _parameters(facts)
    return {
        "config": asdict(facts.config),
        "layout": facts.layout,
        "dtype": facts.dtype,
        "chat_format": facts.chat_format,
        "tokenizer_file": facts.tokenizer_file,
        "parameters": parameters,
        "active_parameters": _active_parameters(facts, parameters),
        "tensors": len(facts.index),
        "bytes": sum(entry.num_bytes for entry in _stored(facts)),
        "groups": {
            group: {
                "tensors": len(entries),
                "bytes": sum(entry.num_bytes for entry in entries),
                "dtypes": sorted({entry.dtype for entry in entries}),
            }
            for group, entries in _grouped(facts).items()
            if entries
        },
        "files": {
            file: sum(entry.num_bytes for entry in _stored(facts) if entry.file == file)
            for file in sorted({entry.file for entry in facts.index})
        },
    }


def release_table(facts: ReleaseFacts) -> str:
    """Facts as aligned lines, then the groups of tensors and the files that hold them."""
    told, config = release_json(facts), facts.config
    experts = (
        f"{config.num_experts}, {config.num_experts_per_tok} per token"
        if config.is_moe
        else "none (dense)"
    )
    window = "none" if config.sliding_window is None else f"{config.sliding_window} tokens"
    active = f", {_billions(told['active_parameters'])} active per token" if config.is_moe else ""
    rows = [
        ("layout", facts.layout),
        ("parameters", f"{_billions(told['parameters'])}{active}"),
        ("weights", f"{told['bytes']:,} bytes, mostly {facts.dtype}"),
        ("layers", f"{config.n_layers}"),
        ("width", f"{config.dim}, feed-forward {config.hidden_dim}"),
        (
            "heads",
            f"{config.n_heads} of {config.head_dim}, {config.n_kv_heads} for keys and values",
        ),
        ("experts", experts),
        ("vocabulary", f"{config.vocab_size} ({facts.tokenizer_file})"),
        ("context", f"{config.max_context_tokens} tokens"),
        ("window", window),
        ("rope theta", f"{config.rope_theta:,.10g}"),
        ("chat", "none (a base model)" if facts.chat_format == "none" else facts.chat_format),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows]
    lines += ["", f"{'tensors':<13}{'count':>7}{'bytes':>18}  dtype"]
    for group, sums in told["groups"].items():
        dtypes = ", ".join(sums["dtypes"])
        lines.append(f"{group:<13}{sums['tensors']:>7}{sums['bytes']:>18,}  {dtypes}")
    files = [f"{file}  {num_bytes:,} bytes" for file, num_bytes in told["files"].items()]
    if len(files) > _MAX_FILES:
        files[_MAX_FILES - 1 : -1] = [f"... {len(files) - _MAX_FILES} more ..."]
    lines += ["", *files]
    return "\n".join(lines)


def _stored(facts: ReleaseFacts) -> Iterable[TensorEntry]:
    """Entries without those that point at another's bytes (tied embeddings)."""
    return {(entry.file, entry.offset): entry for entry in facts.index}.values()


def _parameters(facts: ReleaseFacts) -> int:
    return sum(entry.num_bytes // DTYPE_BYTES[entry.dtype] for entry in _stored(facts))


def _active_parameters(facts: ReleaseFacts, parameters: int) -> int:
    """Those that compute one token: of the experts only as many as it is routed to."""
    config = facts.config
    if not config.is_moe:
        return parameters
    experts = sum(
        entry.num_bytes // DTYPE_BYTES[entry.dtype]
        for entry in _stored(facts)
        if ".experts." in entry.name
    )
    return parameters - experts * (config.num_experts - config.num_experts_per_tok) // (
        config.num_experts
    )


def _grouped(facts: ReleaseFacts) -> dict[str, list[TensorEntry]]:
    grouped: dict[str, list[TensorEntry]] = {group: [] for group in GROUPS}
    for entry in facts.index:
        grouped[_group(entry.name)].append(entry)
    return grouped


def _group(name: str) -> str:
    if name.startswith("tok_embeddings"):
        return "embeddings"
    if name.startswith("output"):
        return "output"
    if "norm" in name:
        return "norms"
    if ".attention." in name:
        return "attention"
    if ".experts." in name:
        return "experts"
    return "router" if ".gate." in name else "feed-forward"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
