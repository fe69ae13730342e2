"""The closed loop: what goes round, step by step, against closed forms and a plain simulation."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.search.loop import Run, loop_tokens_per_s
from magnetar.cluster.search.search import Search
from magnetar.tests.planning import every_route, random_problem


def run(
    *stages_s: tuple[float, float], batches: int, hop_s: float = 0.0, sequences: int = 4
) -> Run:
    """Of stages that take so long in steps without prompts, and in full ones."""
    calm, full = zip(*stages_s, strict=True)
    hops = [hop_s] * len(calm)
    return Run(
        streams=sequences * batches,
        micro_batches=batches,
        sequences=sequences,
        size=64,
        calm_s=calm,
        full_s=full,
        calm_ways_s=hops,
        full_ways_s=hops,
    )


def test_without_prompts_to_speak_of_it_is_the_slowest_stage_or_the_round_trip() -> None:
    one = run((0.1, 0.1), (0.2, 0.2), batches=1, hop_s=0.05)
    many = run((0.1, 0.1), (0.2, 0.2), batches=4, hop_s=0.05)
    alone, crowded = loop_tokens_per_s([one, many])
    # Streams whose prompts are being read make no tokens.
    assert 0.9 * 4 / 0.4 < alone < 4 / 0.4
    assert 0.9 * 4 / 0.2 < crowded < 4 / 0.2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_runs_beside_each_other_are_those_of_a_plain_simulation(seed: int) -> None:
    draw = random.Random(seed)
    runs = []
    for _ in range(3):
        calm = [draw.uniform(0.01, 0.1) for _ in range(draw.randint(1, 4))]
        runs.append(
            run(
                *((each, each * draw.uniform(1, 4)) for each in calm),
                batches=draw.randint(1, 6),
                hop_s=draw.choice((0.0, 0.02)),
                sequences=draw.randint(1, 16),
            )
        )
    found = loop_tokens_per_s(runs)
    assert found == pytest.approx([plainly(each) for each in runs])


def plainly(run: Run) -> float:
    """Step by step and stage by stage."""
    free = [0.0] * len(run.calm_s)
    back: list[float] = []
    made, due, waiting, began, at_first = 0.0, 0.0, 0.0, 0.0, 0.0
    room = max(run.size - run.sequences, run.size // 4)
    for number in range(512):
        decoded = max(0.0, run.streams - math.ceil(waiting / 256)) / run.micro_batches
        made, due = made + decoded, due + decoded
        if due >= 256:
            due, waiting = due - 256, waiting + 256
        read = min(waiting, room)
        waiting -= read
        at = back[number - run.micro_batches] if number >= run.micro_batches else 0.0
        share = read / room
        for stage in range(len(free)):
            begins = max(at, free[stage])
            calm, full = run.calm_s[stage], run.full_s[stage]
            free[stage] = begins + calm + share * (full - calm)
            calm, full = run.calm_ways_s[stage], run.full_ways_s[stage]
            at = free[stage] + calm + share * (full - calm)
        back.append(at)
        if number == 128:
            began, at_first = at, made
    return (made - at_first) / (back[-1] - began)


@pytest.mark.parametrize("batches", [1, 3])
def test_longer_steps_with_prompts_never_make_it_faster(batches: int) -> None:
    rates = loop_tokens_per_s(
        [run((0.1, full), (0.1, full), batches=batches) for full in (0.1, 0.2, 0.4, 0.8)]
    )
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.3 * rates[-1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_sites=st.integers(1, 3),
    num_layers=st.integers(1, 6),
    longer=st.sampled_from((0.0, 0.05, 0.5)),
)
def test_the_evenest_cuts_are_those_of_brute_force(
    seed: int, num_sites: int, num_layers: int, longer: float
) -> None:
    problem = random_problem(seed, num_sites=num_sites, num_layers=num_layers, step_tokens=4)
    routes = list(every_route(problem))
    for route in routes:
        most_s = route.round_trip_s * (1 + longer)
        least_s = min(
            other.bottleneck_s
            for other in routes
            if other.sites == route.sites and other.round_trip_s <= most_s
        )
        found = Search(problem).evened(route, most_s)
        assert found.sites == route.sites
        assert found.round_trip_s <= most_s
        assert found.bottleneck_s == pytest.approx(least_s)
