"""Helix's published clusters: maximum flow of a layout, the best chain, and closed loops."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from magnetar.benchmarks.closed_loop import Load, Server, Waiting, waiting_tokens_per_s

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
Layout = Sequence[Sequence[int]]
"""[first, end) of every node, [] for none."""


class HelixCluster:
    """One of the clusters with its tables."""

    def __init__(self, name: str) -> None:
        self.data: dict[str, Any] = yaml.safe_load((DATA / f"{name}.yaml").read_text("utf-8"))
        self.kinds = [self.data["node_types"][kind] for kind in self.data["nodes"]]
        self.num_layers: int = self.data["model"]["layers"]
        self._activation = self.data["model"]["activation_bytes_per_token"]
        self._wire = self.data["links"]["between_nodes"]

    def capacity(self, node: int, layers: int) -> float:
        """Tokens per second of a node with so many layers: its own, or its network card's."""
        card = self.kinds[node]["nic_bytes_per_s"] / self._activation
        return float(min(self.kinds[node]["token_throughput"][layers - 1], card))

    def chain(self) -> list[list[int]]:
        """The one chain of most flow: for a rate, every node takes the most layers that keep it.

        Rates are those that a node may have; the largest one for which the layers suffice wins.
        What is too much is taken from whoever then is slowest.
        """
        nodes = range(len(self.kinds))
        rates = sorted(
            {self.capacity(n, k) for n in nodes for k in range(1, self._most(n) + 1)}, reverse=True
        )
        for rate in rates:
            counts = [
                max(
                    (k for k in range(1, self._most(n) + 1) if self.capacity(n, k) >= rate),
                    default=0,
                )
                for n in nodes
            ]
            if sum(counts) < self.num_layers:
                continue
            while sum(counts) > self.num_layers:
                held = [n for n in nodes if counts[n]]
                counts[min(held, key=lambda n: (self.capacity(n, counts[n]), n))] -= 1
            rest = [self.capacity(n, counts[n]) for n in nodes if counts[n]]
            if min(rest) < rate:
                continue
            order = sorted(nodes, key=lambda n: (-counts[n], n))
            layout: list[list[int]] = [[] for _ in nodes]
            start = 0
            for node in order:
                if counts[node]:
                    layout[node] = [start, start + counts[node]]
                    start += counts[node]
            return layout
        raise ValueError("no chain holds the model")

    def _most(self, node: int) -> int:
        return len(self.kinds[node]["token_throughput"])

    def flow(self, layout: Layout) -> tuple[float, list[tuple[float, list[int]]]]:
        """Maximum flow in tokens per second, and the paths that carry it."""
        source, sink = -1, len(layout)
        wire = self._wire["bandwidth_bytes_per_s"] / self._activation
        token = self.data["links"]["source_and_sink"]["bandwidth_bytes_per_s"]
        token /= self.data["model"]["token_bytes"]
        used = [n for n, span in enumerate(layout) if span]
        # A node is two points, into it and out of it.
        rest: dict[tuple[int, int], dict[tuple[int, int], float]] = {}

        def join(a: tuple[int, int], b: tuple[int, int], capacity: float) -> None:
            rest.setdefault(a, {})[b] = capacity
            rest.setdefault(b, {}).setdefault(a, 0.0)

        for n in used:
            first, end = layout[n]
            join((n, 0), (n, 1), self.capacity(n, end - first))
            if first == 0:
                join((source, 1), (n, 0), token)
            if end == self.num_layers:
                join((n, 1), (sink, 0), token)
            for other in used:
                if layout[other][0] == end:
                    join((n, 1), (other, 0), wire)
        total, paths = 0.0, []
        whole = {a: dict(b) for a, b in rest.items()}
        while path := _widest(rest, (source, 1), (sink, 0)):
            amount = min(rest[a][b] for a, b in pairwise(path))
            for a, b in pairwise(path):
                rest[a][b] -= amount
                rest[b][a] += amount
            total += amount
        carried = {
            a: {b: whole[a][b] - left for b, left in to.items() if whole[a][b] - left > 1e-9}
            for a, to in rest.items()
        }
        while path := _widest(carried, (source, 1), (sink, 0)):
            amount = min(carried[a][b] for a, b in pairwise(path))
            for a, b in pairwise(path):
                carried[a][b] -= amount
            paths.append((amount, [n for n, side in path[1:-1] if side == 0]))
        return total, paths

    def decode_tokens_per_s(
        self, layout: Layout, policy: Waiting, *, warm_s: float, measured_s: float
    ) -> float:
        """Of a closed loop that keeps 0.8 of the room for keys and values in use."""
        servers = [self._server(n, span) for n, span in enumerate(layout)]
        work = self.data["workload"]
        mean_in, mean_out = work["trace_mean_input_tokens"], work["trace_mean_output_tokens"]
        # Two halves of short and long requests around the published means.
        load = Load(
            prompts=[round(mean_in * x) for x in (0.4, 0.8, 1.2, 1.6)],
            outputs=[round(mean_out * x) for x in (1.6, 0.4, 1.2, 0.8)],
            kv_share=0.8,
        )

        def hop_s(source: int, target: int, tokens: int) -> float:
            size = 2 if source < 0 or target < 0 else self._activation
            wire = self._wire
            return float(wire["latency_s"] + tokens * size / wire["bandwidth_bytes_per_s"])

        paths = self.flow(layout)[1]
        return waiting_tokens_per_s(
            servers, paths, hop_s, load, policy, warm_s=warm_s, measured_s=measured_s
        )

    def in_flight_of(self, kind: dict[str, Any], layers: int) -> int:
        """Requests that such a loop keeps on a node with so many layers."""
        work = self.data["workload"]
        mean = work["trace_mean_input_tokens"] + work["trace_mean_output_tokens"]
        return int(0.8 * kind["kv_blocks"][layers - 1] * work["kv_block_tokens"] / mean)

    def in_flight_choices(self) -> list[int]:
        """All such numbers of any kind of node that hold the model together, ascending."""
        of_kinds = [
            [self.in_flight_of(kind, k + 1) for k in range(len(kind["kv_blocks"]))]
            for kind in self.kinds
        ]

        def layers_with(streams: int) -> int:
            return sum(sum(room >= streams for room in rooms) for rooms in of_kinds)

        every = sorted({room for rooms in of_kinds for room in rooms if room})
        return [streams for streams in every if layers_with(streams) >= self.num_layers]

    def _server(self, node: int, span: Sequence[int]) -> Server:
        kind, layers = self.kinds[node], (span[1] - span[0]) if span else 0
        if not layers:
            return Server(step_s=lambda decodes, prompt: 0.0, kv_tokens=0.0)
        decode, prompt = kind["decode_ms_per_layer"], kind["prompt_ms_per_layer"]

        def step_s(decodes: int, tokens: int) -> float:
            ms = at_tokens(decode, decodes) + at_tokens(prompt, tokens)
            return layers * ms / 1000

        return Server(
            step_s=step_s,
            kv_tokens=kind["kv_blocks"][layers - 1] * self.data["workload"]["kv_block_tokens"],
            most_decodes=kind["decode_max_tokens"][layers - 1],
            most_prompts=kind["prompt_max_requests"][layers - 1],
        )


def at_tokens(table: dict[str, list[float]], tokens: int) -> float:
    """Between the two nearest entries; beyond the last, as its slope goes on."""
    xs, ys = table["tokens"], table["ms"]
    if tokens <= 0:
        return 0.0
    at = min(max(1, bisect_right(xs, tokens)), len(xs) - 1)
    if at == 1:  # the first entry is what any batch takes, but for tokens of a short prompt
        return ys[1] if xs[1] <= 2 else ys[1] * max(tokens / xs[1], 0.1)
    slope = (ys[at] - ys[at - 1]) / (xs[at] - xs[at - 1])
    return ys[at - 1] + slope * (tokens - xs[at - 1])


def _widest(
    rest: dict[tuple[int, int], dict[tuple[int, int], float]],
    source: tuple[int, int],
    sink: tuple[int, int],
) -> list[tuple[int, int]]:
    """A shortest path with room for more, [] if there is none."""
    came: dict[tuple[int, int], tuple[int, int]] = {source: source}
    front = [source]
    while front and sink not in came:
        reached = []
        for point in front:
            for other, left in rest.get(point, {}).items():
                if left > 1e-9 and other not in came:
                    came[other] = point
                    reached.append(other)
        front = reached
    if sink not in came:
        return []
    path = [sink]
    while path[-1] != source:
        path.append(came[path[-1]])
    return path[::-1]
