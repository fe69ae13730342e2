"""The facts of a model that loading, planning and computing agree on."""

from dataclasses import dataclass
from typing import Literal

ChatFormat = Literal["none", "mistral-v1", "chatml"]
"""How messages become tokens. `none` is a base model: it completes text and does not chat."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One decoder-only transformer of the Mistral family, dense or with experts.

    The names are those of the release's ``params.json``. ``num_experts`` is 0 for a dense model.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float
    max_context_tokens: int
    sliding_window: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    tie_embeddings: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward layers are routed to experts."""
        return self.num_experts > 0

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one layer keeps for one token: a key and a value per KV head."""
        return 2 * self.n_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseHints:
    """Facts that a release's own files may lack; None where nothing is known.

    They come from the user (flags, manifest) and from the catalogue by info-hash.
    """

    rope_theta: float | None = None
    sliding_window: int | Literal["none"] | None = None
    """``"none"`` says that the model attends to everything."""
    max_context_tokens: int | None = None
    chat_format: ChatFormat | None = None
