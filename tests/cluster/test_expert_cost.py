"""Experts of a layer on several devices: hit sets, the slowest host, tables made by hand."""

import itertools

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.machines import Link
from magnetar.cluster.search.cost import Speed, distinct_experts, model_cost
from magnetar.cluster.search.expert_cost import Array, Seat, hit_sets, hosts_s, token_weights
from magnetar.tests.planning import MIXTRAL, POPULARITY

COST = model_cost(*MIXTRAL, "bf16")
ATTENTION, EXPERT = COST.attention_bytes[0], COST.expert_bytes[0]


def popularity(domain: str) -> Array:
    """[32, 8]: how often a token needs each expert of each layer."""
    found = yaml.safe_load(POPULARITY.read_text(encoding="utf-8"))["domains"][domain]
    shares: Array = np.array(found["counts"]) / found["routed_tokens"]
    return shares


def link(seconds: float, gbps: float) -> Link:
    return Link(source="a", target="b", rtt_s=0.0, gbps=gbps, overhead_s=seconds)


def spread(num_hosts: int) -> Array:
    """Experts dealt to hosts in turn."""
    held = np.zeros((1, num_hosts, 8), dtype=np.int64)
    for expert in range(8):
        held[0, expert % num_hosts, expert] = 1
    return held


def parallel_layer_s(read_gbps: float, wire: Link, *, tokens: int, num_hosts: int = 8) -> float:
    speed = Speed(read_gbps=read_gbps)
    seats = [Seat(speed=speed), *[Seat(speed=speed, link=wire)] * (num_hosts - 1)]
    return float(hosts_s(COST, 0, seats, spread(num_hosts), tokens=tokens)[0])


@settings(max_examples=40, deadline=None)
@given(num_experts=st.integers(2, 6), per_token=st.integers(1, 2), tokens=st.integers(1, 4))
def test_hit_sets_are_those_of_counting_every_choice(
    num_experts: int, per_token: int, tokens: int
) -> None:
    choices = list(itertools.combinations(range(num_experts), per_token))
    counted = np.zeros(1 << num_experts)
    for chosen in itertools.product(choices, repeat=min(tokens, 3)):
        counted[sum(1 << e for e in set(itertools.chain(*chosen)))] += 1
    found = hit_sets(num_experts, per_token, min(tokens, 3))
    assert found == pytest.approx(counted / counted.sum(), abs=1e-12)


def test_tokens_drawn_by_weights_need_experts_as_often_as_measured() -> None:
    shares = popularity("high_school_us_history")[11]
    weights = token_weights(tuple(shares), 2)
    chance = hit_sets(8, 2, 1, weights)
    hit = [sum(chance[s] for s in range(256) if s >> e & 1) for e in range(8)]
    assert hit == pytest.approx(shares * 2 / shares.sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "uniform", "history", "learning"),
    [
        (1, 2.00, 2.00, 2.00),
        (2, 3.50, 3.49, 3.48),
        (4, 5.47, 5.43, 5.39),
        (8, 7.20, 7.14, 7.07),
        (16, 7.92, 7.88, 7.84),
        (32, 8.00, 7.99, 7.98),
        (64, 8.00, 8.00, 7.99),
    ],
)
def test_distinct_experts_are_those_of_measured_routing(
    tokens: int, uniform: float, history: float, learning: float
) -> None:
    assert distinct_experts(8, 2, tokens) == pytest.approx(uniform, abs=0.006)
    read = distinct_experts(8, 2, tokens) * EXPERT + ATTENTION
    read_gb = {1: 25.2, 2: 42.1, 4: 64.3, 8: 83.8, 16: 92.0, 32: 92.9, 64: 92.9}[tokens]
    assert read * 32 / 1e9 == pytest.approx(read_gb, abs=0.06)
    for domain, expected in (("high_school_us_history", history), ("machine_learning", learning)):
        mean = np.mean([distinct_experts(8, 2, tokens, row) for row in popularity(domain)])
        assert mean == pytest.approx(expected, abs=0.006)


LINKS = {
    "1 GbE": link(150e-6, 0.125),
    "10 GbE": link(40e-6, 1.25),
    "100 GbE": link(6e-6, 12.5),
    "NVLink": link(3e-6, 300),
    "call, 1 GbE": link(1e-3, 0.125),
}
BATCH_1_MS = {
    50: "506/297 505/283 505/280 505/279 512/352",
    200: "128/88 127/73 126/70 126/70 134/142",
    320: "80/62 79/47 79/44 79/44 86/116",
    1008: "27/32 25/17 25/14 25/14 33/86",
    3350: "9/22 8/8 8/5 8/4 15/77",
}


@pytest.mark.parametrize("read_gbps", BATCH_1_MS)
def test_one_token_takes_what_the_table_of_layers_against_experts_says(read_gbps: int) -> None:
    for name, cell in zip(LINKS, BATCH_1_MS[read_gbps].split(), strict=True):
        wire, (pipeline_ms, parallel_ms) = LINKS[name], map(float, cell.split("/"))
        hop = wire.overhead_s + COST.hidden_bytes / (wire.gbps * 1e9)
        alone = 32 * (ATTENTION + 2 * EXPERT) / read_gbps / 1e9 + 7 * hop
        assert alone * 1000 == pytest.approx(pipeline_ms, abs=0.6)
        together = 32 * (ATTENTION / read_gbps / 1e9 + parallel_layer_s(read_gbps, wire, tokens=1))
        # The table lets both experts be remote always; one of them is at home in a quarter.
        assert together * 1000 == pytest.approx(parallel_ms, abs=0.6, rel=0.045)


@pytest.mark.parametrize(
    ("wire", "limit_gbps"),
    [
        (link(150e-6, 0.125), 817),
        (link(40e-6, 1.25), 3784),
        (link(1e-3, 0.125), 165),
        (link(0.7e-3, 1.25), 249),
    ],
)
@pytest.mark.parametrize(("num_hosts", "factor"), [(2, 0.73), (4, 0.89), (8, 1.0)])
def test_helpers_pay_below_the_break_even_bandwidth(
    wire: Link, limit_gbps: float, num_hosts: int, factor: float
) -> None:
    def gain(read_gbps: float) -> float:
        both = 2 * EXPERT / read_gbps / 1e9
        return both - parallel_layer_s(read_gbps, wire, tokens=1, num_hosts=num_hosts)

    # The break-even table sends every row through a network card of its own; ours is shared.
    assert gain(limit_gbps * factor * 0.78) > 0
    assert gain(limit_gbps * factor * 1.02) < 0


@pytest.mark.parametrize(
    ("tokens", "read_gbps", "cells"),
    [
        (8, 320, "99/140 101/184 101/197 101/199 92/72"),
        (32, 320, "157/388 159/652 159/722 159/730 152/234"),
        (32, 1008, "477/606 497/1654 501/2203 501/2277 433/298"),
        (32, 3350, "1422/742 1621/3312 1660/6606 1664/7322 1092/328"),
        (128, 320, "431/750 444/2210 445/2833 445/2918 421/569"),
        (128, 1008, "1269/909 1385/4547 1401/8308 1402/9085 1189/655"),
        (128, 3350, "3455/976 4473/6930 4640/22357 4657/29040 2919/690"),
    ],
)
def test_terms_make_the_table_of_throughput(tokens: int, read_gbps: int, cells: str) -> None:
    for name, cell in zip(LINKS, cells.split(), strict=True):
        wire, (pipeline, parallel) = LINKS[name], map(float, cell.split("/"))
        batch = tokens // 8
        hop = wire.overhead_s + batch * COST.hidden_bytes / (wire.gbps * 1e9)
        stage = 4 * (ATTENTION + distinct_experts(8, 2, batch) * EXPERT) / read_gbps / 1e9
        assert batch / (stage + hop) == pytest.approx(pipeline, rel=0.01)
        # There attention is spread over the nodes: each sends the rows of its own eighth.
        rows = 1.75 * tokens / 8
        there = wire.overhead_s + rows * COST.hidden_bytes / (wire.gbps * 1e9)
        expert = distinct_experts(8, 2, tokens) / 8 * EXPERT
        layer = (ATTENTION + expert) / read_gbps / 1e9 + 2 * there
        assert tokens / (32 * layer) == pytest.approx(parallel, rel=0.01)


def test_many_experts_are_taken_at_their_means() -> None:
    from dataclasses import replace

    many = replace(COST, num_experts=64, experts_per_token=6)
    held = np.zeros((2, 2, 64), dtype=np.int64)
    held[0, 0] = 1
    held[1, 0, :32] = held[1, 1, 32:] = 1
    seats = [Seat(speed=Speed(read_gbps=100)), Seat(speed=Speed(read_gbps=100), link=link(0, 1e6))]
    alone, halved = hosts_s(many, 0, seats, held, tokens=32)
    assert alone == pytest.approx(distinct_experts(64, 6, 32) * EXPERT / 100e9, rel=1e-6)
    assert halved == pytest.approx(alone / 2, rel=0.01)
