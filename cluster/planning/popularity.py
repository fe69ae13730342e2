"""From how often experts were chosen to how likely a token needs each. Pure."""

from collections.abc import Mapping, Sequence

from ...fetcher.config import ModelConfig


def popularity_of(
    expert_tokens: Mapping[int, Sequence[int]], config: ModelConfig
) -> tuple[tuple[float, ...], ...]:
    """[layers][experts]: the probability that a token needs an expert, as `cost.py` takes it.

    Each layer sums to `num_experts_per_tok`. `expert_tokens` has, by layer, the tokens that each
    expert was chosen for (`DeploymentStatus`, `/metrics`); of a layer without any all experts are
    alike. One token for every expert is added to what was counted (Laplace), so that little
    traffic says little, and no expert seems never to be needed.

    Raises:
        ValueError: counts that cannot be of this model.
    """
    found = []
    for layer in range(config.n_layers):
        counts = expert_tokens.get(layer, (0,) * config.num_experts)
        if len(counts) != config.num_experts or min(counts, default=0) < 0:
            raise ValueError(
                f"counts of {len(counts)} experts of layer {layer}, the least {min(counts)}; the "
                f"model has {config.num_experts}"
            )
        whole = sum(counts) + config.num_experts
        found.append(tuple(config.num_experts_per_tok * (n + 1) / whole for n in counts))
    return tuple(found)
