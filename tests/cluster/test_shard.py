import itertools

from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.plan import StagePlan
from magnetar.cluster.shard import shard_of
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


def stage(first: int, end: int) -> StagePlan:
    return StagePlan(
        index=0,
        host="a",
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


@given(st.sets(st.integers(1, 11)), st.integers(1, 4))
def test_the_shards_of_all_nodes_are_the_model_and_no_tensor_is_in_two(
    cuts: set[int], num_nodes: int
) -> None:
    edges = [0, *sorted(cuts), 12]
    stages = [stage(first, end) for first, end in itertools.pairwise(edges)]
    by_node = [stages[node::num_nodes] for node in range(num_nodes)]

    shards = [shard_of(INDEX, of_node) for of_node in by_node]

    assert sorted(entry.name for shard in shards for entry in shard) == sorted(NAMES)
    for of_node, shard in zip(by_node, shards, strict=True):
        held = {layer for each in of_node for layer in range(each.first_layer, each.end_layer)}
        layers = {int(e.name.split(".")[1]) for e in shard if e.name.startswith("layers")}
        assert layers == held


def test_layer_1_is_not_layer_11() -> None:
    assert [entry.name for entry in shard_of(INDEX, [stage(1, 2)])] == [
        "layers.1.attention.wq",
        "layers.1.ffn_norm",
    ]
