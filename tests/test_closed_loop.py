"""The simulator behind the planner's benchmark: against sums, and a public cluster."""

import pytest

from magnetar.benchmarks.closed_loop import (
    Load,
    Server,
    Steps,
    Waiting,
    steps_tokens_per_s,
    waiting_tokens_per_s,
)
from magnetar.benchmarks.helix import HelixCluster

NO_PROMPTS = Load(prompts=(1,), outputs=(10_000,), streams=4)


def server(seconds: float, kv_tokens: float = 1e9) -> Server:
    return Server(step_s=lambda decodes, prompt: seconds, kv_tokens=kv_tokens)


def test_one_micro_batch_goes_around_with_everybody_in_it() -> None:
    rate = steps_tokens_per_s(
        [server(0.1), server(0.3)],
        lambda at, tokens: 0.05,
        NO_PROMPTS,
        Steps(micro_batches=1),
        num_steps=400,
    )
    assert rate == pytest.approx(4 / 0.5, rel=0.01)


def test_two_micro_batches_keep_the_slower_stage_busy() -> None:
    rate = steps_tokens_per_s(
        [server(0.2), server(0.3)],
        lambda at, tokens: 0.0,
        NO_PROMPTS,
        Steps(micro_batches=2),
        num_steps=800,
    )
    assert rate == pytest.approx(2 / 0.3, rel=0.01)


def test_room_for_keys_and_values_limits_who_runs() -> None:
    load = Load(prompts=(50,), outputs=(50,), streams=8)
    rate = steps_tokens_per_s(
        [server(0.1, kv_tokens=250)],
        lambda at, tokens: 0.0,
        load,
        Steps(micro_batches=1),
        num_steps=2000,
    )
    # Two fit, and every step brings each of them one token.
    assert rate == pytest.approx(2 / 0.1, rel=0.03)


def test_servers_that_batch_what_waits_serve_paths_by_their_weight() -> None:
    servers = [server(0.1, 1000), server(0.1, 1000)]
    rate = waiting_tokens_per_s(
        servers,
        [(1.0, [0]), (1.0, [1])],
        lambda source, target, tokens: 0.0,
        Load(prompts=(50,), outputs=(50,)),
        Waiting(),
        warm_s=60,
        measured_s=300,
    )
    # Ten requests fit on each, in two groups: while one is computed the other waits.
    assert rate == pytest.approx(2 * 10 / 0.2, rel=0.05)


@pytest.mark.parametrize("name", ["helix-single24", "helix-small10"])
def test_the_flow_of_published_layouts_is_the_published_one(name: str) -> None:
    cluster = HelixCluster(name)
    for layout, spans in cluster.data["layouts"].items():
        known = cluster.data["results"].get(layout, {}).get("max_flow")
        if known is not None:
            flow, paths = cluster.flow(spans)
            assert flow == pytest.approx(known, rel=1e-5)
            assert sum(amount for amount, _ in paths) == pytest.approx(flow)


@pytest.mark.parametrize(
    ("name", "best"), [("helix-single24", 2045.64), ("helix-small10", 286.587)]
)
def test_the_best_chain_has_the_most_flow_that_is_known(name: str, best: float) -> None:
    cluster = HelixCluster(name)
    assert cluster.flow(cluster.chain())[0] == pytest.approx(best, rel=1e-5)
