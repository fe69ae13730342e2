"""What published models are like."""

from magnetar.fetcher.config import ModelConfig

MIXTRAL_8X7B = ModelConfig(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32000,
    rope_theta=1e6,
    max_context_tokens=32768,
    num_experts=8,
    num_experts_per_tok=2,
)
