"""A tiny model in a GGUF file, as the demo's weights are, and the release made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from magnetar.fetcher.checkpoint.release import FolderReader, ReleaseFacts, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints

DIM, HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "1", "ab", "Ġab"]
MERGES = ["a b", "Ġ ab"]
EXPERTS = ("w1", "w2", "w3")


def write_gguf(path: Path, *, change: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """A tiny Llama in fp32; `change` replaces metadata (None drops it) and tensors (arrays)."""
    change = dict(change or {})
    metadata: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": DIM,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "general.name": "Tiny",
        "general.organization": "Tests",
        "general.license": "apache-2.0",
        "tokenizer.ggml.pre": "smollm",
    }
    rng = np.random.default_rng(0)
    kv_dim = DIM // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(TOKENS), DIM), "output_norm": (DIM,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (DIM,),
            f"blk.{layer}.attn_q": (DIM, DIM),
            f"blk.{layer}.attn_k": (kv_dim, DIM),
            f"blk.{layer}.attn_v": (kv_dim, DIM),
            f"blk.{layer}.attn_output": (DIM, DIM),
            f"blk.{layer}.ffn_norm": (DIM,),
            f"blk.{layer}.ffn_gate": (HIDDEN, DIM),
            f"blk.{layer}.ffn_up": (HIDDEN, DIM),
            f"blk.{layer}.ffn_down": (DIM, HIDDEN),
        }
    tensors = {
        f"{name}.weight": rng.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    architecture = change.pop("general.architecture", "llama")
    for name, value in change.items():
        (tensors if isinstance(value, np.ndarray) else metadata)[name] = value
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def facts_of(folder: Path) -> ReleaseFacts:
    return read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())


def source_of(folder: Path) -> FileTensorSource:
    return FileTensorSource(folder, facts_of(folder).index)
