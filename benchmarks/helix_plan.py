"""Our planner on Helix's clusters: its search over their tables, for what a closed loop can keep.

How many requests are in flight is not asked for there, it follows from the room for keys and values
that a layout leaves. So the search runs once for every number that some node's layers allow, with
that room taken, and the best one wins; so does the most decodes that a step may have.
"""

from dataclasses import dataclass

import numpy as np

from magnetar.benchmarks.helix import HelixCluster, Layout, at_tokens
from magnetar.cluster.search.contest import busiest
from magnetar.cluster.search.problem import Problem, Site

CAPS = (4, 6, 8, 12, 16, 21, 30, 42, 60, 84)


@dataclass(frozen=True, kw_only=True)
class HelixPlan:
    """A layout with the most decodes of a step that it was made for."""

    layout: Layout
    most_decodes: int
    tokens_per_s: float
    """Of decoding, as the cost model says."""


def helix_plan(cluster: HelixCluster, *, chunk_tokens: int) -> HelixPlan:
    """The layout of most decoded tokens per second under the planner's score."""
    found: HelixPlan | None = None
    for streams in cluster.in_flight_choices():
        best = busiest(
            [_problem(cluster, streams, cap, chunk_tokens) for cap in CAPS if cap <= streams]
        )
        if best is None:
            continue
        problem, route = best
        score = route.tokens_per_s(problem)
        if found is None or score > found.tokens_per_s:
            layout: list[list[int]] = [[] for _ in cluster.kinds]
            for site, start, end in zip(route.sites, route.starts, route.ends, strict=True):
                layout[site] = [start, end]
            found = HelixPlan(layout=layout, most_decodes=problem.step_tokens, tokens_per_s=score)
    assert found is not None
    return found


def _problem(cluster: HelixCluster, streams: int, cap: int, chunk_tokens: int) -> Problem:
    """Layers in seconds of a step of `cap` decodes with the prompts that come with them; room in
    layers that leave as many requests as `streams` their keys and values."""
    work = cluster.data["workload"]
    prompts = work["trace_mean_input_tokens"] / work["trace_mean_output_tokens"]
    chunks = cap * prompts / chunk_tokens
    layers = np.arange(cluster.num_layers + 1)
    sites = []
    for kind in cluster.kinds:
        decode = at_tokens(kind["decode_ms_per_layer"], cap)
        prompt = at_tokens(kind["prompt_ms_per_layer"], chunk_tokens)
        rooms = [cluster.in_flight_of(kind, k) for k in range(1, len(kind["kv_blocks"]) + 1)]
        sites.append(
            Site(
                seconds_L=layers * (decode + chunks * prompt) / 1000,
                needs_L=layers.astype(float),
                capacity=float(sum(room >= streams for room in rooms)),
            )
        )
    wire, count = cluster.data["links"]["between_nodes"], len(sites)
    tokens = cap * (1 + prompts)
    carried = tokens * cluster.data["model"]["activation_bytes_per_token"]
    transfer = np.full((count, count), carried / wire["bandwidth_bytes_per_s"])
    return Problem(
        sites=tuple(sites),
        hop_s=transfer + wire["latency_s"],
        return_s=np.full((count, count), 2 * wire["latency_s"]),
        transfer_s=transfer,
        step_tokens=cap,
        streams=streams,
    )
