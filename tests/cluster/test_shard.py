import itertools
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.deployment.shard import loading_steps, shard_of
from magnetar.cluster.plan import ExpertHost, ExpertIds, Pipeline, Plan, StagePlan
from magnetar.fetcher.tensors import TensorEntry, TensorIndex

NAMES = (
    "tok_embeddings.weight",
    *(f"layers.{layer}.{part}" for layer in range(12) for part in ("attention.wq", "ffn_norm")),
    "norm.weight",
    "output.weight",
)
INDEX = TensorIndex(
    {
        name: TensorEntry(
            name=name, source_name=name, file="w", offset=at * 8, dtype="bf16", shape=(4,)
        )
        for at, name in enumerate(NAMES)
    }
)


def stage(first: int, end: int, *, host: str = "a") -> StagePlan:
    return StagePlan(
        index=0,
        host=host,
        device="cpu",
        first_layer=first,
        end_layer=end,
        has_embeddings=first == 0,
        has_output=end == 12,
        dtype="bf16",
        num_threads=1,
        weights_bytes=0,
        kv_bytes=0,
        free_bytes=0,
    )


def plan_of(*stages: StagePlan) -> Plan:
    pipeline = Pipeline(stages=stages, num_kv_blocks=1, max_concurrency=1)
    return Plan(pipelines=(pipeline,), max_context_tokens=16)


@given(st.sets(st.integers(1, 11)), st.integers(1, 4))
def test_the_shards_of_all_nodes_are_the_model_and_no_tensor_is_in_two(
    cuts: set[int], num_nodes: int
) -> None:
    edges = [0, *sorted(cuts), 12]
    plan = plan_of(
        *(
            stage(first, end, host=f"h{number % num_nodes}")
            for number, (first, end) in enumerate(itertools.pairwise(edges))
        )
    )

    shards = {f"h{node}": shard_of(INDEX, plan, f"h{node}") for node in range(num_nodes)}

    assert sorted(entry.name for shard in shards.values() for entry in shard) == sorted(NAMES)
    for host, shard in shards.items():
        held = {
            layer
            for each in plan.stages
            if each.host == host
            for layer in range(each.first_layer, each.end_layer)
        }
        layers = {int(e.name.split(".")[1]) for e in shard if e.name.startswith("layers")}
        assert layers == held


@given(st.sets(st.integers(1, 11)), st.integers(1, 4))
def test_a_node_brings_the_first_layers_of_its_stages_first_and_every_tensor_once(
    cuts: set[int], num_nodes: int
) -> None:
    edges = [0, *sorted(cuts), 12]
    plan = plan_of(
        *(
            stage(first, end, host=f"h{number % num_nodes}")
            for number, (first, end) in enumerate(itertools.pairwise(edges))
        )
    )
    for host in plan.hosts:
        steps = loading_steps(INDEX, plan, host)
        assert sorted(entry.name for step in steps for entry in step) == sorted(
            entry.name for entry in shard_of(INDEX, plan, host)
        )
        at = {entry.name: number for number, step in enumerate(steps) for entry in step}
        for each in (stage for stage in plan.stages if stage.host == host):
            layers = [
                at[f"layers.{layer}.ffn_norm"] for layer in range(each.first_layer, each.end_layer)
            ]
            # Behind the embeddings, where there are any; then step by step, the output last.
            assert layers == list(range(each.has_embeddings, each.has_embeddings + len(layers)))
            if each.has_output:
                assert at["norm.weight"] == at["output.weight"] == len(layers) + layers[0]


def test_layer_1_is_not_layer_11() -> None:
    assert [entry.name for entry in shard_of(INDEX, plan_of(stage(1, 2)), "a")] == [
        "layers.1.attention.wq",
        "layers.1.ffn_norm",
    ]


EXPERTS = tuple(
    f"layers.{layer}.feed_forward.{part}.weight"
    for layer in (2, 3)
    for part in ("gate", *(f"experts.{expert}.w{n}" for expert in range(11) for n in (1, 2, 3)))
)
SPARSE = TensorIndex(
    {
        name: TensorEntry(
            name=name, source_name=name, file="w", offset=at * 8, dtype="bf16", shape=(4,)
        )
        for at, name in enumerate(EXPERTS)
    }
)


def helper(host: str, experts: ExpertIds) -> ExpertHost:
    return ExpertHost(
        host=host, device="cpu", num_threads=1, weights_bytes=0, free_bytes=0, experts=experts
    )


def experts_of(plan: Plan, host: str) -> set[tuple[int, int]]:
    """Layer and id; each expert with all of its three matrices."""
    names = [entry.name.split(".") for entry in shard_of(SPARSE, plan, host)]
    found = [(int(n[1]), int(n[4])) for n in names if n[3] == "experts"]
    assert len(found) == 3 * len(set(found))
    return set(found)


def test_a_helper_reads_its_experts_and_the_stage_the_others_and_the_router() -> None:
    spread = replace(
        stage(2, 4),
        experts=((0, 1, 2), (10,)),
        helpers=(helper("b", ((1, 3), (1,))), helper("a", ((4,), ()))),
    )
    plan = plan_of(spread)
    assert experts_of(plan, "b") == {(2, 1), (2, 3), (3, 1)}
    assert [len(step) for step in loading_steps(SPARSE, plan, "b")] == [6, 3]
    # Another device of the stage's node is a helper too: what it holds comes to the same disk.
    assert experts_of(plan, "a") == {(2, 0), (2, 1), (2, 2), (2, 4), (3, 10)}
    gates = [entry.name for entry in shard_of(SPARSE, plan, "a") if "gate" in entry.name]
    assert len(gates) == 2
    assert not [entry for entry in shard_of(SPARSE, plan, "b") if "gate" in entry.name]


def test_a_stage_that_holds_every_expert_reads_all_for_all_that_it_also_helps() -> None:
    whole, spread = stage(2, 3), replace(stage(3, 4, host="b"), index=1, experts=((0,),))
    plan = plan_of(whole, replace(spread, helpers=(helper("a", ((5, 6),)),)))
    assert experts_of(plan, "a") == {(2, expert) for expert in range(11)} | {(3, 5), (3, 6)}
