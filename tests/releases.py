"""Writes tiny random releases in every layout, and returns the transformers model they hold.

The models are real ones of the family (Mixtral, Mistral with a window, Llama) with hidden size 64;
the tokenizers are real ones with 512 pieces. Everything is a function of the seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from magnetar.fetcher.config import ReleaseHints
from magnetar.tests.release_tokenizers import sentencepiece_model, write_huggingface_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layout = Literal[
    "mistral-pth", "mistral-pt", "mistral-safetensors", "huggingface", "huggingface-sharded"
]
Dtype = Literal["fp32", "bf16"]
LAYOUTS: tuple[Layout, ...] = (
    "mistral-pth",
    "mistral-pt",
    "mistral-safetensors",
    "huggingface",
    "huggingface-sharded",
)

HIDDEN = 64
INTERMEDIATE = 96
NUM_HEADS = 4
NUM_KV_HEADS = 2
NUM_EXPERTS = 8
MAX_CONTEXT_TOKENS = 512
ROPE_THETA = 1e6
HINTS = ReleaseHints(
    rope_theta=ROPE_THETA, sliding_window="none", max_context_tokens=MAX_CONTEXT_TOKENS
)
"""What the params.json of the mistral layouts lack (a window they have is in the file, so give
these as `known`: the file wins)."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_release(
    folder: Path,
    *,
    layout: Layout,
    moe: bool = True,
    dtype: Dtype = "fp32",
    num_layers: int = 4,
    sliding_window: int | None = None,
    seed: int = 0,
    vocab_size: int = 512,
    tokenizer: bool = True,
    tie_embeddings: bool = False,
    tokenizer_model: Path | None = None,
) -> PreTrainedModel:
    """Write a random release into `folder` (made if needed) and return its model.

    The model is in eval mode and in float32 with exactly the stored values. A dense release is
    Mistral when it has a sliding window and Llama otherwise. `tokenizer_model` is a sentencepiece
    file to use for the mistral layouts instead of the tiny one. `tie_embeddings` is for the
    Hugging Face layouts only. `read_release` refuses a release without a tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = _random_model(
        moe=moe,
        num_layers=num_layers,
        sliding_window=sliding_window,
        seed=seed,
        vocab_size=vocab_size,
        tie_embeddings=tie_embeddings,
        dtype=TORCH_DTYPES[dtype],
    )
    if layout in ("huggingface", "huggingface-sharded"):
        # A copy, because converting the model and back would round its rotary frequencies.
        stored = copy.deepcopy(model).to(TORCH_DTYPES[dtype])
        shard = "200KB" if layout == "huggingface-sharded" else "5GB"
        stored.save_pretrained(folder, max_shard_size=shard)
        if tokenizer:
            write_huggingface_tokenizer(folder, vocab_size, max_tokens=MAX_CONTEXT_TOKENS)
        return model
    tensors = {
        name: tensor.to(TORCH_DTYPES[dtype]).contiguous()
        for name, tensor in mistral_tensors(model).items()
    }
    params = _params(model)
    if layout == "mistral-pth":
        hashed = [folder / "consolidated.00.pth"]
        torch.save(tensors, hashed[0])
    elif layout == "mistral-pt":
        hashed = _write_parts(folder, fused_tensors(tensors))
        params = _renamed_params(model)
    else:
        from safetensors.torch import save_file

        hashed = [folder / "consolidated.safetensors"]
        save_file(tensors, hashed[0])
    (folder / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")
    if tokenizer:
        target = folder / "tokenizer.model"
        raw = tokenizer_model.read_bytes() if tokenizer_model else sentencepiece_model(vocab_size)
        target.write_bytes(raw)
        hashed.append(target)
    (folder / "RELEASE").write_text(_release_banner(hashed), encoding="utf-8")
    return model


def mistral_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's weights under the release's own names, q and k rows in interleaved order."""
    state: dict[str, torch.Tensor] = model.state_dict()
    tensors = {"tok_embeddings.weight": state["model.embed_tokens.weight"]}
    for layer in range(model.config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        attention = f"{theirs}.self_attn"
        tensors[f"{ours}.attention.wq.weight"] = _interleave(
            state[f"{attention}.q_proj.weight"], NUM_HEADS
        )
        tensors[f"{ours}.attention.wk.weight"] = _interleave(
            state[f"{attention}.k_proj.weight"], NUM_KV_HEADS
        )
        tensors[f"{ours}.attention.wv.weight"] = state[f"{attention}.v_proj.weight"]
        tensors[f"{ours}.attention.wo.weight"] = state[f"{attention}.o_proj.weight"]
        tensors[f"{ours}.attention_norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        tensors[f"{ours}.ffn_norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        if f"{theirs}.mlp.gate.weight" not in state:
            tensors[f"{ours}.feed_forward.w1.weight"] = state[f"{theirs}.mlp.gate_proj.weight"]
            tensors[f"{ours}.feed_forward.w2.weight"] = state[f"{theirs}.mlp.down_proj.weight"]
            tensors[f"{ours}.feed_forward.w3.weight"] = state[f"{theirs}.mlp.up_proj.weight"]
            continue
        tensors[f"{ours}.feed_forward.gate.weight"] = state[f"{theirs}.mlp.gate.weight"]
        gate_up = state[f"{theirs}.mlp.experts.gate_up_proj"]
        down = state[f"{theirs}.mlp.experts.down_proj"]
        for expert in range(NUM_EXPERTS):
            name = f"{ours}.feed_forward.experts.{expert}"
            # Cloned, so that every tensor has a storage of its own, as in the release.
            tensors[f"{name}.w1.weight"] = gate_up[expert, :INTERMEDIATE].clone()
            tensors[f"{name}.w2.weight"] = down[expert].clone()
            tensors[f"{name}.w3.weight"] = gate_up[expert, INTERMEDIATE:].clone()
    tensors["norm.weight"] = state["model.norm.weight"]
    tensors["output.weight"] = state["lm_head.weight"]
    return tensors


def fused_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The release's tensors as its Hugging Face repository has them in eight ``.pt`` parts.

    The experts of a layer are stacked by rows in matrices of two dimensions, `w2` turned over.
    """
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".feed_forward.experts.0." in name:
            layer, part = name.split(".")[1], name.split(".")[5]
            experts = [
                tensors[name.replace(".experts.0.", f".experts.{e}.")] for e in range(NUM_EXPERTS)
            ]
            rows = [expert.T if part == "w2" else expert for expert in experts]
            fused[f"layers.{layer}.block_sparse_moe.{part}"] = torch.cat(rows)
        elif ".feed_forward.gate." in name:
            fused[name.replace("feed_forward", "block_sparse_moe")] = tensor
        elif ".experts." not in name:
            fused[name] = tensor
    return fused


def _write_parts(folder: Path, tensors: Mapping[str, torch.Tensor]) -> list[Path]:
    """Eight files, each with every eighth tensor."""
    parts = []
    for number in range(8):
        parts.append(folder / f"consolidated.{number:02}.pt")
        torch.save({name: tensors[name] for name in list(tensors)[number::8]}, parts[-1])
    return parts


def _renamed_params(model: PreTrainedModel) -> dict[str, Any]:
    """The params.json beside the eight parts: names of a config.json, the window as a string."""
    config = model.config
    params = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": ROPE_THETA,
        "sliding_window": str(getattr(config, "sliding_window", None)),
    }
    if hasattr(config, "num_local_experts"):
        params |= {"num_experts_per_tok": 2, "num_local_experts": NUM_EXPERTS}
    return params


def _random_model(
    *,
    moe: bool,
    num_layers: int,
    sliding_window: int | None,
    seed: int,
    vocab_size: int,
    tie_embeddings: bool,
    dtype: torch.dtype,
) -> PreTrainedModel:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "vocab_size": vocab_size,
        "initializer_range": 0.2,
        "max_position_embeddings": MAX_CONTEXT_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "tie_word_embeddings": tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if moe:
        options |= {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
        options |= {"sliding_window": sliding_window}
        config, kind = transformers.MixtralConfig(**options), transformers.MixtralForCausalLM
    elif sliding_window is not None:
        options |= {"head_dim": HIDDEN // NUM_HEADS, "sliding_window": sliding_window}
        config, kind = transformers.MistralConfig(**options), transformers.MistralForCausalLM
    else:
        options |= {"head_dim": HIDDEN // NUM_HEADS}
        config, kind = transformers.LlamaConfig(**options), transformers.LlamaForCausalLM
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm that is left out
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.copy_(parameter.to(dtype))
    return model


def _interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows from half-split rotary order (transformers) to pairs side by side (the release)."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _params(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of the release's params.json, in its order: no theta and no context length."""
    config = model.config
    params: dict[str, Any] = {
        "dim": HIDDEN,
        "n_layers": config.num_hidden_layers,
        "head_dim": HIDDEN // NUM_HEADS,
        "hidden_dim": INTERMEDIATE,
        "n_heads": NUM_HEADS,
        "n_kv_heads": NUM_KV_HEADS,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if getattr(config, "sliding_window", None) is not None:
        params["sliding_window"] = config.sliding_window
    if hasattr(config, "num_local_experts"):
        params["moe"] = {"num_experts_per_tok": 2, "num_experts": NUM_EXPERTS}
    return params


def _release_banner(files: list[Path]) -> str:
    """A RELEASE file: md5 rows between box-drawing characters, below a title."""
    rows = [f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    lines = ["", "tiny random release", "", ".. md5 ..", "", *rows, ""]
    middle = [f"║{line.center(76)}║" for line in lines]
    return "\n".join([f"╔{'═' * 76}╗", *middle, f"╚{'═' * 76}╝", ""])
