"""The files of the demo's release: a GGUF model in, a Hugging Face release out."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ...errors import DiskSpaceError, InterruptedByUserError, UsageError
from ..config import ModelConfig
from ..progress import Progress, ProgressSink
from ..tensors import DTYPE_BYTES

if TYPE_CHECKING:
    from .gguf_llama import LlamaGGUF
    from .upcycle import Upcycled

DemoDtype = Literal["bf16", "fp32"]

SHARD_BYTES: Final = 300_000_000
_SPARE_BYTES: Final = 64 << 20
_HF_DTYPES: Final[Mapping[DemoDtype, str]] = {"bf16": "bfloat16", "fp32": "float32"}
_CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Without the system prompt that SmolLM2's own template puts first: what is sent is all."""


def write_release(
    weights: Path,
    folder: Path,
    *,
    num_experts: int,
    noise: float,
    seed: int,
    dtype: DemoDtype,
    max_shard_bytes: int = SHARD_BYTES,
    on_progress: ProgressSink | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Write the Hugging Face release of the GGUF file `weights` into `folder`, which is made.

    Raises:
        UsageError: such a model cannot be.
        CheckpointError, TokenizerError: the file is no Llama with a vocabulary that is known.
        DiskSpaceError, InterruptedByUserError, PreflightError: as in `build_demo_release`.
    """
    from .byte_level_bpe import tokenizer_json
    from .gguf_llama import LlamaGGUF
    from .upcycle import Upcycled

    if num_experts < 0 or num_experts == 1 or not 0 <= noise < 1:
        raise UsageError(
            f"There is no demo model of {num_experts} experts with noise {noise}: give no experts "
            "or at least two, and noise from 0 to less than 1."
        )
    on_progress = on_progress or (lambda _: None)
    # Reading the vocabulary takes seconds, before anything can be counted.
    on_progress(Progress(phase="build", message=f"reading {weights.name}"))
    gguf = LlamaGGUF(weights)
    model = Upcycled(gguf, num_experts=num_experts, noise=noise, seed=seed)
    folder.mkdir(parents=True)
    _refuse_small_disk(folder, model.num_values * DTYPE_BYTES[dtype])
    tokenizer = tokenizer_json(
        tokens=gguf.tokens,
        merges=gguf.merges,
        control_ids=gguf.control_ids,
        pre_tokenizer=gguf.field("tokenizer.ggml.pre"),
    )
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    _write_descriptions(folder, gguf, model.config, dtype=dtype)
    (folder / "README.md").write_text(
        _readme(gguf, model.config, noise=noise, seed=seed), encoding="utf-8"
    )
    _write_weights(
        folder,
        model,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        on_progress=on_progress,
        stop=stop or threading.Event(),
    )


def _write_weights(
    folder: Path,
    model: Upcycled,
    *,
    dtype: DemoDtype,
    max_shard_bytes: int,
    on_progress: ProgressSink,
    stop: threading.Event,
) -> None:
    import torch

    from .shard_writer import ShardWriter

    stored = getattr(torch, _HF_DTYPES[dtype])
    writer = ShardWriter(folder, max_shard_bytes=max_shard_bytes)
    total_bytes = model.num_values * DTYPE_BYTES[dtype]
    began, done_bytes = time.monotonic(), 0
    for name, tensor in model.tensors():
        if stop.is_set():
            raise InterruptedByUserError("stopped while the demo's model was made")
        writer.add(name, tensor.to(stored))
        done_bytes += tensor.numel() * DTYPE_BYTES[dtype]
        rate = done_bytes / max(time.monotonic() - began, 1e-3)
        on_progress(
            Progress(
                phase="build",
                done_bytes=done_bytes,
                total_bytes=total_bytes,
                rate_bytes_per_s=rate,
                message=name,
            )
        )
    writer.finish()
    on_progress(
        Progress(phase="build", done_bytes=done_bytes, total_bytes=total_bytes, finished=True)
    )


def _write_descriptions(
    folder: Path, gguf: LlamaGGUF, config: ModelConfig, *, dtype: DemoDtype
) -> None:
    tokens = gguf.tokens
    bos_id = int(gguf.field("tokenizer.ggml.bos_token_id"))
    eos_id = int(gguf.field("tokenizer.ggml.eos_token_id"))
    pad_id = int(gguf.field("tokenizer.ggml.padding_token_id"))
    kind = "Mixtral" if config.is_moe else "Llama"
    described: dict[str, Any] = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.norm_eps,
        # The first is read by transformers 4 and what was written for it, the second by 5.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": _HF_DTYPES[dtype],
    }
    if config.is_moe:
        described |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "sliding_window": None,
            "output_router_logits": False,
        }
    _write_json(folder / "config.json", described)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id},
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_context_tokens,
            "bos_token": tokens[bos_id],
            "eos_token": tokens[eos_id],
            "pad_token": tokens[pad_id],
            "unk_token": tokens[int(gguf.field("tokenizer.ggml.unknown_token_id"))],
            "chat_template": _CHATML,
        },
    )


def _readme(gguf: LlamaGGUF, config: ModelConfig, *, noise: float, seed: int) -> str:
    what = "This is the dense model."
    if config.is_moe:
        what = (
            f"Each feed-forward layer became {config.num_experts} experts, of which a random "
            f"router takes {config.num_experts_per_tok} for each token. Every expert is a copy of "
            f"the layer with Gaussian noise of {noise:g} times the standard deviation of each "
            f"matrix (seed {seed}). Nothing was trained: it knows what the dense model knows, or a "
            "little less, and is there to show how a mixture of experts is distributed and served."
        )
    return f"""\
# SmolLM2-135M-Instruct for Magnetar's demo

Made from {gguf.path.name}, dequantised, with Hugging Face's names and row order.
The model is {gguf.field("general.name")!r} by {gguf.field("general.organization")}.

{what}

The changed weights are under the licence of the model, {gguf.field("general.license")}.
"""


def _refuse_small_disk(folder: Path, weights_bytes: int) -> None:
    needed, free = weights_bytes + _SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise DiskSpaceError(
            f"The demo's model needs {needed / 1e9:.1f} GB in {folder.parent} and {free / 1e9:.1f} "
            "GB are free: make room, or give another folder with --store."
        )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
