"""The figures of Mixtral 8x7B at its full size; no numbers are needed, only where they lie."""

import pytest

from magnetar.fetcher.checkpoint.canonical import expected_tensors
from magnetar.fetcher.config import ModelConfig
from magnetar.fetcher.piece_map import PieceMap
from magnetar.fetcher.split import (
    split_costs,
    split_experts,
    split_json,
    split_layers,
    split_table,
)
from magnetar.fetcher.tensors import TensorEntry, TensorIndex
from magnetar.tests.published import MIXTRAL_8X7B

FILE = "consolidated.00.pth"
HEAD_BYTES = 200_000


def laid_out(config: ModelConfig) -> tuple[TensorIndex, dict[str, int]]:
    """As an older torch wrote it: members in the order of their numbers as strings."""
    tensors = list(expected_tensors(config))
    placed = {}
    offset = HEAD_BYTES // 64 * 64
    for number in sorted(range(len(tensors)), key=str):
        tensor = tensors[number]
        placed[tensor.name] = entry = TensorEntry(
            name=tensor.name,
            source_name=tensor.name,
            file=FILE,
            offset=offset,
            dtype="bf16",
            shape=tuple(tensor.shape),
        )
        offset += entry.num_bytes + 64
    index = TensorIndex({tensor.name: placed[tensor.name] for tensor in tensors})
    return index, {FILE: offset + 100_000}


@pytest.fixture(scope="module")
def mixtral() -> tuple[TensorIndex, dict[str, int]]:
    return laid_out(MIXTRAL_8X7B)


def test_shares_hold_every_tensor_once(mixtral: tuple[TensorIndex, dict[str, int]]) -> None:
    index, _ = mixtral
    for num_nodes in (1, 3, 4, 8):
        for shares in (split_layers(index, num_nodes), split_experts(index, num_nodes)):
            names = [entry.name for share in shares for entry in share]
            assert sorted(names) == sorted(entry.name for entry in index)
            assert all(shares)


def test_overhead_grows_with_the_piece_length_as_measured(
    mixtral: tuple[TensorIndex, dict[str, int]],
) -> None:
    costs = split_costs(*mixtral, 4, None)

    by_layers = [cost.overhead for cost in costs["layers"]]
    assert by_layers == pytest.approx([0.002, 0.007, 0.013, 0.026, 0.051], abs=0.001)
    by_experts = [cost.overhead for cost in costs["experts"]]
    assert by_experts == pytest.approx([0.0025, 0.010, 0.020, 0.040, 0.080], abs=0.001)
    for cost in costs["layers"] + costs["experts"]:
        # What several nodes fetch is shared inside: from outside comes hardly more than the model.
        assert cost.unique_bytes <= cost.needed_bytes * 1.001 + 2 * cost.piece_length
        assert cost.needed_bytes == sum(entry.num_bytes for entry in mixtral[0])


def test_the_torrents_own_piece_length_comes_first_and_once(
    mixtral: tuple[TensorIndex, dict[str, int]],
) -> None:
    index, sizes = mixtral
    own = PieceMap.of_files(sizes, piece_length=16 << 20)

    found = [cost.piece_length >> 20 for cost in split_costs(index, sizes, 4, own)["layers"]]

    assert found == [16, 1, 4, 8, 32]


def test_a_dense_model_has_no_experts_to_split() -> None:
    entry = TensorEntry(
        name="layers.0.x", source_name="x", file=FILE, offset=0, dtype="bf16", shape=(4,)
    )
    costs = split_costs(TensorIndex({"layers.0.x": entry}), {FILE: 8}, 2, None)

    assert list(costs) == ["layers"]
    assert [node["node_bytes"] for node in split_json(costs)["layers"]] == [[8, 0]] * 5
    assert "node 1" in split_table(costs, has_own=False)
