"""A release as one GGUF file in bf16, for llama.cpp.

    python gguf_copy.py FOLDER FILE

Tensors are read in canonical form, whose rotary rows lie as llama.cpp wants them. There is no
vocabulary in the file: nothing is measured with text.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch

from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ModelConfig, ReleaseHints

OUTER = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
DENSE = {
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
PLAIN = ("norm.weight", "ffn_gate_inp.weight")
"""What llama.cpp keeps in fp32."""


def names(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Each tensor of the copy, with the canonical ones that lie in it one after the other."""
    for canonical, name in OUTER.items():
        yield name, [canonical]
    for layer in range(config.n_layers):
        for canonical, name in DENSE.items():
            if config.is_moe and canonical[-2:] in EXPERTS and "feed_forward" in canonical:
                continue
            if not config.is_moe and canonical.endswith("gate"):
                continue
            yield f"blk.{layer}.{name}.weight", [f"layers.{layer}.{canonical}.weight"]
        if config.is_moe:
            prefix = f"layers.{layer}.feed_forward.experts"
            for part, name in EXPERTS.items():
                yield (
                    f"blk.{layer}.{name}.weight",
                    [f"{prefix}.{e}.{part}.weight" for e in range(config.num_experts)],
                )


def copy(folder: Path, file: Path) -> None:
    """Write the file; it appears when it is whole."""
    facts = read_release(FolderReader(folder), given=ReleaseHints(), known=ReleaseHints())
    config, source = facts.config, FileTensorSource(folder, facts.index)
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(config.max_context_tokens)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    plan = list(names(config))
    if config.tie_embeddings:
        plan = [(name, parts) for name, parts in plan if name != "output.weight"]
    bf16 = gguf.GGMLQuantizationType.BF16
    for name, parts in plan:
        shape = list(source.index[parts[0]].shape)
        shape = [len(parts), *shape] if len(parts) > 1 else shape
        num_values = torch.Size(shape).numel()
        if name.endswith(PLAIN):
            writer.add_tensor_info(name, shape, torch.zeros(1).numpy().dtype, 4 * num_values)
        else:
            # In bytes, as the writer wants it for what numpy has no type for.
            raw = [*shape[:-1], 2 * shape[-1]]
            dtype = torch.zeros(1, dtype=torch.uint8).numpy().dtype
            writer.add_tensor_info(name, raw, dtype, 2 * num_values, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in plan:
        tensor = torch.stack([source.read(part_name) for part_name in parts])
        if name.endswith(PLAIN):
            writer.write_tensor_data(tensor.float().numpy())
        else:
            writer.write_tensor_data(tensor.to(torch.bfloat16).view(torch.uint8).numpy())
    writer.close()
    part.rename(file)


if __name__ == "__main__":
    copy(Path(sys.argv[1]), Path(sys.argv[2]))
