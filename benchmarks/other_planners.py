"""Our planner beside others: on Helix's clusters, and on random ones against four more."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from magnetar.benchmarks.closed_loop import Waiting
from magnetar.benchmarks.helix import HelixCluster, Layout
from magnetar.benchmarks.helix_plan import helix_plan
from magnetar.benchmarks.random_clusters import KINDER, Cluster, profile_inventory
from magnetar.benchmarks.rows import row

HELD_OUT = 200_001
"""The first random cluster by which nothing in the planner was ever chosen."""
CHUNK_TOKENS = 64
"""Of prompts in one step of Helix's clusters."""


def helix(seconds: float) -> Iterator[dict[str, Any]]:
    """Helix's clusters: maximum flow, and closed loops under its policy and under chunks."""
    large, small = HelixCluster("helix-single24"), HelixCluster("helix-small10")
    chain = large.chain()
    began = time.perf_counter()
    flow = large.flow(large.chain())[0]
    took = time.perf_counter() - began
    case = "helix-single24, maximum flow of the chain, tokens/s"
    yield row(case, flow, 1289.556, ">= 2045", flow >= 2045)
    yield row("the same, seconds to find it", took, 1.0, "< 1", took < 1)
    layouts, published = large.data["layouts"], large.data["results"]

    def loop(cluster: HelixCluster, layout: Layout, policy: Waiting) -> float:
        return cluster.decode_tokens_per_s(layout, policy, warm_s=240, measured_s=seconds)

    base = loop(large, layouts["helix"], Waiting())
    for name in ("swarm", "exo_ring", "chain", "chain_kv"):
        ours = loop(large, layouts[name], Waiting()) / base
        known = published[name].get("remeasured")
        if known is None:
            known = published[name]["sim_offline"] / published["helix"]["sim_offline"]
        else:
            known /= published["helix"]["remeasured"]
        case = f"simulated decoding of {name} to that of helix, whole prompts in order"
        yield row(case, ours, known, "within 15 %", abs(ours / known - 1) <= 0.15)
    chain = small.chain()
    flow = small.flow(chain)[0]
    yield row("helix-small10, maximum flow", flow, 286.587, ">= 286.6 rounded", flow >= 286.55)
    for cluster, least in ((large, 1.3), (small, 1.0)):
        yield from _helix_decoding(cluster, least, seconds)


def _helix_decoding(
    cluster: HelixCluster, least: float, seconds: float
) -> Iterator[dict[str, Any]]:
    """Our plan and the published layout under chunked prefill and a cap of decodes: the cap that
    the plan was made for, its multiples, and whichever of them suits each side best.

    All requests are there at once, and their prompts take minutes to get through; only then is the
    loop in its steady state.
    """
    name, found = cluster.data["name"], helix_plan(cluster, chunk_tokens=CHUNK_TOKENS)
    caps = [found.most_decodes * factor for factor in (1, 2, 4)]
    ours, theirs = (
        [
            cluster.decode_tokens_per_s(
                layout,
                Waiting(chunk_tokens=CHUNK_TOKENS, most_decodes=cap),
                warm_s=480,
                measured_s=seconds,
            )
            for cap in caps
        ]
        for layout in (found.layout, cluster.data["layouts"]["helix"])
    )
    goal = f">= {least:g}"
    for cap, our, their in zip(caps, ours, theirs, strict=True):
        case = f"{name}, decode tokens/s, chunks of {CHUNK_TOKENS}, at most {cap} decodes a step"
        yield row(case, our, their, goal, our >= least * their)
    case = f"{name}, decode tokens/s, each with the best of these caps"
    yield row(case, max(ours), max(theirs), goal, max(ours) >= least * max(theirs))
    case = f"{name}, decode tokens/s as planned, to those simulated"
    yield row(
        case,
        found.tokens_per_s,
        ours[0],
        "within 25 %",
        abs(found.tokens_per_s / ours[0] - 1) <= 0.25,
    )


def against_other_planners(seeds: range) -> Iterator[dict[str, Any]]:
    """exo's memory ring, Petals' block choice, Parallax' water-filling and an even split.

    A cluster is 3 to 8 machines of the named profiles, each behind a network of its own kind; the
    model is Mixtral in bf16. All layouts run in the same closed loop of 16 streams, the others'
    as their planners make them, with a micro-batch a stage and 512 tokens a step, the defaults.
    What would help them is told too: all nodes filled by the speeds of our own cost model, as a
    fifth; of each as many copies as are best; and on every fourth cluster as many micro-batches and
    as large steps, both of which our plans say. On clusters from `HELD_OUT` on it is the fifth
    alone. A row a cluster; `summary` of them all makes those with goals.
    """
    for seed in seeds:
        cluster = Cluster(profile_inventory(seed))
        baselines = cluster.baselines()
        found: dict[str, Any] = {"case": f"cluster {seed}", "seed": seed}
        found["planned"], found["others_planned"] = bool(cluster.found), bool(baselines)
        if cluster.found and baselines:
            ours = cluster.ours()
            found |= {"ours": float(f"{ours:.5g}"), "pipelines": len(cluster.found)}
            found["others"] = {name: float(f"{rate:.5g}") for name, rate in baselines.items()}
            found["ratio"] = float(f"{ours / max(baselines.values()):.4g}")
            kinder = cluster.baselines(KINDER)
            found["ratio_by_speed"] = float(f"{ours / max(kinder.values()):.4g}")
            if seed < HELD_OUT:
                found |= _with_copies(cluster, ours, any_batches=seed % 4 == 0)
        yield found


def _with_copies(cluster: Cluster, ours: float, *, any_batches: bool) -> dict[str, Any]:
    nodes = len(cluster.placing.places)
    copied = cluster.baselines(KINDER, most_copies=nodes)
    found = {"ratio_any_copies": float(f"{ours / max(copied.values()):.4g}")}
    if any_batches:
        best = max(cluster.baselines(KINDER, most_copies=nodes, any_batches=True).values())
        found["ratio_any_copies_and_batches"] = float(f"{ours / best:.4g}")
    return found


def summary(clusters: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What rows of clusters come to; of those that were held out by themselves."""
    yield from _summary([each for each in clusters if each["seed"] < HELD_OUT], "clusters")
    held_out = [each for each in clusters if each["seed"] >= HELD_OUT]
    if held_out:
        yield from _summary(held_out, "clusters held out")


def _summary(clusters: Sequence[dict[str, Any]], what: str) -> Iterator[dict[str, Any]]:
    only = sum(each["others_planned"] and not each["planned"] for each in clusters)
    yield row(f"{what} where only others fit", only, 0, "none", only == 0)
    for key, name in (
        ("ratio", ""),
        ("ratio_by_speed", " and layers by our own speeds"),
        ("ratio_any_copies", ", each of them with its best number of copies"),
        (
            "ratio_any_copies_and_batches",
            ", each of them with its best copies, micro-batches and steps",
        ),
    ):
        found = [float(each[key]) for each in clusters if key in each]
        if not found:
            continue
        mean = math.exp(sum(math.log(ratio) for ratio in found) / len(found))
        case = f"against the best of four planners{name}, geometric mean, {len(found)} {what}"
        yield row(case, mean, 1.0, ">= 1.3", mean >= 1.3)
        yield row("the same, worst cluster", min(found), 1.0, ">= 0.99", min(found) >= 0.99)
