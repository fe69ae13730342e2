"""Chunks of prompts that come whole: they never make a pipeline faster, and hold up long ones."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.search.lumps import likely_tokens_per_s, tokens_per_s_in_lumps
from magnetar.cluster.search.problem import Problem, Route, evaluate
from magnetar.cluster.search.search import Search
from magnetar.tests.planning import every_route, random_problem

CHUNKS, CHUNK_LAYERS = 0.01, 40.0
"""Chunks with a step, and how many layers' time one layer takes for one."""


def with_prompts(calm: Problem) -> Problem:
    """Every layer takes longer by the chunks that come with a step on average."""
    longer = 1 + CHUNKS * CHUNK_LAYERS
    sites = tuple(replace(site, seconds_L=site.seconds_L * longer) for site in calm.sites)
    return replace(calm, sites=sites)


def rates(calm: Problem, route: Route) -> tuple[float, float]:
    problem = with_prompts(calm)
    even = evaluate(problem, route.sites, route.ends)
    return even.tokens_per_s(problem), tokens_per_s_in_lumps(problem, even, calm, CHUNKS)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_sites=st.integers(1, 3), num_layers=st.integers(1, 5))
def test_whole_chunks_are_never_faster_than_even_ones_and_what_is_likely_lies_between(
    seed: int, num_sites: int, num_layers: int
) -> None:
    calm = random_problem(seed, num_sites=num_sites, num_layers=num_layers, step_tokens=4)
    for route in every_route(calm):
        even, lumpy = rates(calm, route)
        assert lumpy <= even * (1 + 1e-9)
        problem = with_prompts(calm)
        prompted = evaluate(problem, route.sites, route.ends)
        likely = likely_tokens_per_s(problem, prompted, calm, CHUNKS)
        assert lumpy * (1 - 1e-9) <= likely <= even * (1 + 1e-9)


def test_one_stage_loses_nothing_and_two_equal_ones_wait_for_each_other() -> None:
    calm = random_problem(5, num_sites=2, num_layers=4, step_tokens=4)
    free = 0.0 * calm.hop_s
    site = replace(calm.sites[0], capacity=1e9, first_s=0.0, last_s=0.0)
    alike = replace(calm, sites=(site, site), hop_s=free, return_s=free, transfer_s=free)
    alone = replace(alike, step_tokens=8)
    one = next(route for route in every_route(alone) if len(route.sites) == 1)
    even, lumpy = rates(alone, one)
    assert lumpy == pytest.approx(even)
    two = max(
        (route for route in every_route(alike) if len(route.sites) == 2),
        key=lambda route: route.tokens_per_s(alike),
    )
    even, lumpy = rates(alike, two)
    assert lumpy < 0.99 * even


def test_a_prompt_in_pieces_holds_up_less_for_they_overlap() -> None:
    calm = random_problem(5, num_sites=2, num_layers=4, step_tokens=4)
    problem = with_prompts(calm)
    for route in every_route(calm):
        timed = evaluate(problem, route.sites, route.ends)
        whole, halves, quarters = (
            tokens_per_s_in_lumps(problem, timed, calm, CHUNKS * pieces, pieces=pieces)
            for pieces in (1, 2, 4)
        )
        if len(route.sites) == 1:
            assert whole == pytest.approx(halves) == pytest.approx(quarters)
        else:
            assert whole < halves < quarters


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
