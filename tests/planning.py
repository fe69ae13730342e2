"""Models as names and shapes, for tests of placement."""

from magnetar.fetcher.config import ModelConfig
from magnetar.fetcher.tensors import StoredDtype, TensorEntry, TensorIndex

GB = 1_000_000_000


def model(
    *, n_layers: int = 32, dim: int = 4096, num_experts: int = 8, dtype: StoredDtype = "bf16"
) -> tuple[ModelConfig, TensorIndex]:
    """Mixtral 8x7B, or a smaller sister, as names and shapes."""
    hidden, kv_dim, vocab = dim * 7 // 2, dim // 4, 32000
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for layer in range(n_layers):
        at = f"layers.{layer}"
        shapes |= {
            f"{at}.attention.wq.weight": (dim, dim),
            f"{at}.attention.wk.weight": (kv_dim, dim),
            f"{at}.attention.wv.weight": (kv_dim, dim),
            f"{at}.attention.wo.weight": (dim, dim),
            f"{at}.feed_forward.gate.weight": (num_experts, dim),
        }
        for expert in range(num_experts):
            for name, shape in {
                "w1": (hidden, dim),
                "w2": (dim, hidden),
                "w3": (hidden, dim),
            }.items():
                shapes[f"{at}.feed_forward.experts.{expert}.{name}.weight"] = shape
    shapes |= {"norm.weight": (dim,), "output.weight": (vocab, dim)}
    entries = {
        name: TensorEntry(name=name, source_name=name, file="w", offset=0, dtype=dtype, shape=shape)
        for name, shape in shapes.items()
    }
    config = ModelConfig(
        dim=dim,
        n_layers=n_layers,
        head_dim=128,
        hidden_dim=hidden,
        n_heads=dim // 128,
        n_kv_heads=kv_dim // 128,
        norm_eps=1e-5,
        vocab_size=vocab,
        rope_theta=1e6,
        max_context_tokens=32768,
        num_experts=num_experts,
        num_experts_per_tok=2,
    )
    return config, TensorIndex(entries)


MIXTRAL = model()
SMALL = model(n_layers=6, dim=512, num_experts=2)
