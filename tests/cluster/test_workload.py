"""What a spec asks of the planner."""

import dataclasses

import pytest

from magnetar.cluster.plan import NodeWish
from magnetar.cluster.planning.expert_pins import ExpertPin
from magnetar.cluster.planning.workload import MIN_CONTEXT_TOKENS, workload_of
from magnetar.cluster.spec import DeploymentSpec, SourceSpec
from magnetar.errors import UsageError
from magnetar.fetcher.config import ModelConfig
from magnetar.manifests.placement import NodeUse

CONFIG = ModelConfig(
    dim=64,
    n_layers=4,
    head_dim=16,
    hidden_dim=96,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=512,
    rope_theta=1e4,
    max_context_tokens=4096,
)
SPEC = DeploymentSpec(
    name="a", source=SourceSpec(kind="folder", location="/r"), store="/s", model_name="m"
)


def test_the_models_own_context_may_shrink() -> None:
    workload = workload_of(SPEC, CONFIG)
    assert workload.max_context_tokens == 4096
    assert workload.min_context_tokens == MIN_CONTEXT_TOKENS


def test_a_context_that_was_asked_for_may_not() -> None:
    workload = workload_of(dataclasses.replace(SPEC, max_context_tokens=1024), CONFIG)
    assert workload.max_context_tokens == 1024
    assert workload.min_context_tokens is None


def test_a_longer_context_than_the_models_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="5000 tokens was asked for, the model has 4096"):
        workload_of(dataclasses.replace(SPEC, max_context_tokens=5000), CONFIG)


def test_a_model_with_a_tiny_context_keeps_it() -> None:
    config = dataclasses.replace(CONFIG, max_context_tokens=128)
    assert workload_of(SPEC, config).min_context_tokens == 128


def test_wishes_for_nodes_come_from_the_manifest() -> None:
    values: list[dict[str, object]] = [
        {"node": "deneb", "exclude": True},
        {"node": "rigel", "memoryGigabytes": 24.0, "layers": "0-7"},
        {"node": "vega", "layers": "31"},
    ]
    assert tuple(NodeUse.model_validate(value).to_wish() for value in values) == (
        NodeWish(host="deneb", exclude=True),
        NodeWish(host="rigel", memory_bytes=24_000_000_000, layers=(0, 8)),
        NodeWish(host="vega", layers=(31, 32)),
    )


def test_experts_that_a_user_places_are_those_of_one_pipeline() -> None:
    assert workload_of(SPEC, CONFIG).num_pipelines is None
    pinned = dataclasses.replace(SPEC, expert_pins=(ExpertPin(host="h", layers=(0,)),))
    assert workload_of(pinned, CONFIG).num_pipelines == 1
    asked = dataclasses.replace(pinned, num_pipelines=2)
    assert workload_of(asked, CONFIG).num_pipelines == 2


def test_experts_on_a_node_that_is_excluded_contradict() -> None:
    spec = dataclasses.replace(
        SPEC,
        expert_pins=(ExpertPin(host="h", layers=(0,)),),
        node_wishes=(NodeWish(host="h", exclude=True),),
    )
    with pytest.raises(UsageError, match="h is excluded, and experts are to be on it"):
        workload_of(spec, CONFIG)
