"""What it costs to split a release over nodes: bytes per node, and pieces that several need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .piece_map import ByteRange, PieceMap, ranges_of
from .tensors import TensorEntry, TensorIndex

COMPARED_PIECE_LENGTHS: Final = tuple(mib << 20 for mib in (1, 4, 8, 16, 32))


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCost:
    """One way to split, at one piece length. The tensors alone; small files are left out."""

    piece_length: int
    node_bytes: tuple[int, ...]
    """Whole pieces that each node fetches."""
    needed_bytes: int
    """Bytes of all nodes' tensors."""
    unique_bytes: int
    """Bytes of the pieces that any node needs: what the cluster must get from outside."""

    @property
    def fetched_bytes(self) -> int:
        """Over all nodes, so that a piece that two need counts twice."""
        return sum(self.node_bytes)

    @property
    def overhead(self) -> float:
        """Fetched beyond what is needed, as a part of it."""
        return self.fetched_bytes / self.needed_bytes - 1 if self.needed_bytes else 0.0


def split_layers(index: TensorIndex, num_nodes: int) -> tuple[tuple[TensorEntry, ...], ...]:
    """Runs of whole layers, as equal as whole layers are; embeddings first, output last."""
    num_layers = 1 + max((_layer(entry.name) for entry in index), default=0)
    shares: list[list[TensorEntry]] = [[] for _ in range(num_nodes)]
    for entry in index:
        if entry.name.startswith("layers."):
            node = _layer(entry.name) * num_nodes // num_layers
        else:
            node = 0 if entry.name.startswith("tok_embeddings") else num_nodes - 1
        shares[node].append(entry)
    return tuple(map(tuple, shares))


def split_experts(index: TensorIndex, num_nodes: int) -> tuple[tuple[TensorEntry, ...], ...]:
    """Equal runs of experts of every layer, on the node of each run; the rest on the first."""
    num_experts = 1 + max((_expert(entry.name) for entry in index), default=-1)
    shares: list[list[TensorEntry]] = [[] for _ in range(num_nodes)]
    for entry in index:
        expert = _expert(entry.name)
        shares[expert * num_nodes // num_experts if expert >= 0 else 0].append(entry)
    return tuple(map(tuple, shares))


def split_cost(piece_map: PieceMap, shares: Sequence[Sequence[TensorEntry]]) -> SplitCost:
    """What these shares cost with the pieces of a map."""
    ranges: list[tuple[ByteRange, ...]] = [ranges_of(share) for share in shares]
    pieces = [piece_map.pieces(parts) for parts in ranges]
    return SplitCost(
        piece_length=piece_map.piece_length,
        node_bytes=tuple(map(piece_map.num_bytes, pieces)),
        needed_bytes=sum(part.num_bytes for parts in ranges for part in parts),
        unique_bytes=piece_map.num_bytes(frozenset().union(*pieces)),
    )


def split_costs(
    index: TensorIndex, sizes: Mapping[str, int], num_nodes: int, own: PieceMap | None
) -> dict[str, tuple[SplitCost, ...]]:
    """Each way to split at the torrent's own piece length, then at the compared ones.

    `sizes` are those of the release's files; `own` is None where there is no torrent.
    """
    ways = {"layers": split_layers(index, num_nodes)}
    if any(_expert(entry.name) >= 0 for entry in index):
        ways["experts"] = split_experts(index, num_nodes)
    maps = [] if own is None else [own]
    maps += [
        PieceMap.of_files(sizes, piece_length=length)
        for length in COMPARED_PIECE_LENGTHS
        if own is None or length != own.piece_length
    ]
    return {way: tuple(split_cost(each, shares) for each in maps) for way, shares in ways.items()}


def split_json(costs: Mapping[str, Sequence[SplitCost]]) -> dict[str, Any]:
    """For programs; amounts are bytes, the overhead a part of what is needed."""
    return {
        way: [
            {
                "piece_length": cost.piece_length,
                "node_bytes": list(cost.node_bytes),
                "needed_bytes": cost.needed_bytes,
                "unique_bytes": cost.unique_bytes,
                "overhead": round(cost.overhead, 6),
            }
            for cost in found
        ]
        for way, found in costs.items()
    }


def split_table(costs: Mapping[str, Sequence[SplitCost]], *, has_own: bool) -> str:
    """For people: the bytes of each node, then the overhead by piece length."""
    lines = []
    for way, found in costs.items():
        first = found[0]
        lines.append(
            f"{way} over {len(first.node_bytes)} nodes, pieces of {_shown(first.piece_length)}"
            + (" (this torrent's)" if has_own else "")
        )
        lines += [
            f"  node {node}  {count:>18,} bytes" for node, count in enumerate(first.node_bytes)
        ]
        lines.append(
            f"  {'pieces of':>10} {'all nodes fetch':>20} {'of that once':>20}  beyond need"
        )
        lines += [
            f"  {_shown(cost.piece_length):>10} {cost.fetched_bytes:>20,} "
            f"{cost.unique_bytes:>20,}  {cost.overhead:+.1%}"
            for cost in found
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def _shown(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"


def _layer(name: str) -> int:
    head, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if head == "layers" else -1


def _expert(name: str) -> int:
    _, found, rest = name.partition(".experts.")
    return int(rest.partition(".")[0]) if found else -1
