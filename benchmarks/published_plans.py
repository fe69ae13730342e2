"""The planner against layouts and optima that others have published, with their numbers."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from magnetar.benchmarks.rows import row
from magnetar.cluster.footprint import footprint
from magnetar.cluster.inventory.profiles import profiles
from magnetar.cluster.machines import Device, Inventory, Node
from magnetar.cluster.plan import Workload
from magnetar.cluster.planning.planner import plan
from magnetar.cluster.search.contest import busiest
from magnetar.cluster.search.cost import (
    assumed_link,
    attention_s,
    device_speed,
    hop_s,
    model_cost,
    output_s,
)
from magnetar.cluster.search.place import MARGIN
from magnetar.cluster.search.problem import Problem, Site
from magnetar.cluster.search.search import Search
from magnetar.tests.cluster.test_expert_cost import BATCH_1_MS, LINKS
from magnetar.tests.cluster.test_expert_plans import alike, planned
from magnetar.tests.planning import MIXTRAL

CONTEXT_TOKENS = 32768
STREAMS = 8


def five_macs() -> Iterator[dict[str, Any]]:
    """exo issue 957: 40 layers of 1 GB, STREAM triads; min-max optimum and the best single one."""
    speeds = (264.4, 344.0, 308.7, 351.2, 177.6)
    memories = (36, 96, 64, 96, 36)
    nothing = np.zeros((5, 5))
    problem = Problem(
        sites=tuple(
            Site(
                seconds_L=np.arange(41) / speed,
                needs_L=np.arange(41.0),
                capacity=float(memory),
            )
            for speed, memory in zip(speeds, memories, strict=True)
        ),
        hop_s=nothing,
        return_s=nothing,
        transfer_s=nothing,
        step_tokens=1,
        streams=10**9,
    )
    found = busiest([problem])
    assert found is not None
    slowest = found[1].bottleneck_s * 1000
    goal = "the published optimum, 29.07 ms"
    yield row("five Macs, slowest stage, ms", slowest, 29.07, goal, slowest <= 29.075)
    alone = Search(problem).fastest()
    assert alone is not None
    trip = alone.round_trip_s * 1000
    goal = "one stream stays on one node, 113.9 ms"
    yield row("five Macs, one stream, ms", trip, 113.9, goal, trip <= 113.95)


def layers_or_experts() -> Iterator[dict[str, Any]]:
    """Equal nodes share experts exactly where the table of break-even says that it is faster."""
    agree = cells = 0
    for read_gbps, line in BATCH_1_MS.items():
        for wire, cell in zip(LINKS.values(), line.split(), strict=True):
            pipeline_ms, parallel_ms = map(float, cell.split("/"))
            found = planned(alike(8, 19, read_gbps, wire))
            shares = any(stage.helpers for stage in found.stages)
            # A tie of whole milliseconds goes to experts: its break-even is 3784 GB/s.
            agree += shares == (parallel_ms <= pipeline_ms)
            cells += 1
    case = "experts apart where one token is faster so, links x memories"
    yield row(case, agree, cells, "all of them", agree == cells)


def first_deployment() -> Iterator[dict[str, Any]]:
    """Mixtral on four cards of 40 GB against the layout it first ran in publicly.

    There every card holds two experts of every layer (24/21/21/21 GiB), the first one also all
    attention and with it all keys and values, and one batch at a time goes through the layers.
    """
    card = replace(profiles()["a100-40"].device, memory_bytes=40 << 30)
    nodes = tuple(
        Node(host="box", address="", num_cpus=64, devices=(replace(card, index=i),))
        for i in range(4)
    )
    box = Inventory(
        nodes=(replace(nodes[0], devices=tuple(n.devices[0] for n in nodes)),),
    )
    workload = Workload(
        max_context_tokens=CONTEXT_TOKENS, max_concurrency=STREAMS, objective="throughput"
    )
    found = plan(*MIXTRAL, box, workload)
    assert found.prediction is not None
    case = "Mixtral bf16 on 4 x 40 GB, streams of 32k tokens"
    yield row(case, found.max_concurrency, STREAMS, ">= 8", found.max_concurrency >= STREAMS)
    ours = found.prediction.tokens_per_s
    one_by_one, together = published_layout(card)
    case = "Mixtral on 4 x 40 GB, tokens/s against the first public layout"
    yield row(f"{case}, its experts in turn", ours, one_by_one, ">= 3", ours >= 3 * one_by_one)
    case += ", all its cards at once (kinder than it was)"
    yield row(case, ours, together, ">= 3", ours >= 3 * together)


def published_layout(card: Device) -> tuple[float, float]:
    """Tokens per second of that layout: with experts in turn, and with cards at once."""
    config, index = MIXTRAL
    weights = footprint(config, index, "bf16")
    cost, speed = model_cost(config, index, "bf16"), device_speed(card, "bf16")
    assert speed is not None
    held = sum(cost.attention_bytes) + 2 * sum(cost.expert_bytes)
    held += weights.embeddings_bytes + weights.output_bytes
    held += weights.workspace_bytes(CONTEXT_TOKENS)
    room = card.memory_bytes * (1 - MARGIN) - held
    streams = int(room // (CONTEXT_TOKENS * weights.kv_bytes_per_token * config.n_layers))
    hop = hop_s(streams * cost.hidden_bytes, assumed_link("box", "box"))
    attention = sum(
        attention_s(cost, layer, speed, tokens=streams, context_tokens=CONTEXT_TOKENS // 2)
        for layer in range(config.n_layers)
    )
    expert_s = cost.expert_bytes[0] / (speed.read_gbps * 1e9)
    in_all, on_one = distinct_experts_of_cards(streams)
    head = output_s(cost, speed, tokens=streams)
    rates = []
    for num_experts in (in_all, on_one):
        step = attention + head + config.n_layers * (num_experts * expert_s + 2 * hop)
        step += card.step_overhead_s  # as every stage of ours has it
        rates.append(streams / step)
    return rates[0], rates[1]


def distinct_experts_of_cards(tokens: int, samples: int = 20_000) -> tuple[float, float]:
    """Expected distinct experts of a step: of all cards, and of the card that has most."""
    draw = random.Random(0)
    in_all = on_one = 0
    for _ in range(samples):
        hit = {expert for _ in range(tokens) for expert in draw.sample(range(8), 2)}
        in_all += len(hit)
        on_one += max(sum(expert // 2 == card for expert in hit) for card in range(4))
    return in_all / samples, on_one / samples
