"""What a deployment asks of the planner, once the model is known."""

from ...errors import UsageError
from ...fetcher.config import ModelConfig
from ..plan import Workload
from ..spec import DeploymentSpec

MIN_CONTEXT_TOKENS = 512
"""A context that nobody asked for is not shortened below this: shorter is of no use."""


def workload_of(spec: DeploymentSpec, config: ModelConfig) -> Workload:
    """The wishes of `spec` with the model's own context where it names none.

    Raises:
        UsageError: a longer context than the model has, or experts on a node that is excluded.
    """
    excluded = {wish.host for wish in spec.node_wishes if wish.exclude}
    if both := sorted(excluded.intersection(pin.host for pin in spec.expert_pins)):
        raise UsageError(
            f"{both[0]} is excluded, and experts are to be on it (placement.experts): leave out one"
        )
    asked = spec.max_context_tokens
    if asked is not None and asked > config.max_context_tokens:
        raise UsageError(
            f"a context of {asked} tokens was asked for, the model has "
            f"{config.max_context_tokens}; ask for that or less"
        )
    return Workload(
        max_context_tokens=asked or config.max_context_tokens,
        max_concurrency=spec.max_concurrency,
        dtype=spec.dtype,
        num_stages=spec.num_stages,
        # Experts that a user places are those of one pipeline.
        num_pipelines=spec.num_pipelines or (1 if spec.expert_pins else None),
        objective=spec.objective,
        separate_experts=True,
        nodes=spec.node_wishes,
        min_context_tokens=(None if asked else min(MIN_CONTEXT_TOKENS, config.max_context_tokens)),
    )
