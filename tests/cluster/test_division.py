"""Devices and streams divided among pipelines: as good as trying every division."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.planning.pipelines_plan import PipelinesPlanner
from magnetar.cluster.search.ceiling import Ceiling, numbers
from magnetar.cluster.search.division import Share, best_division, partitions, shared_out
from magnetar.cluster.search.regrouping import regrouped
from magnetar.cluster.search.sketch import Sketch
from magnetar.tests.shared_experts import cluster_of_pipelines, most_of_divisions

BELL = [1, 1, 2, 5, 15, 52]


@pytest.mark.parametrize("count", range(1, 6))
def test_every_partition_comes_once(count: int) -> None:
    found = [frozenset(groups) for groups in partitions(tuple(range(count)))]
    assert len(found) == len(set(found)) == BELL[count]
    for groups in found:
        assert sorted(n for group in groups for n in numbers(group)) == list(range(count))


class Table:
    """Yields that are drawn by lot, and bounds somewhat above them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.looks = 0

    def _yield(self, share: Share) -> float:
        draw = random.Random(f"{self._seed} {share}")
        return draw.choice([0.0, draw.uniform(0, 10)]) * share.sites.bit_count()

    def most(self, share: Share) -> float:
        draw = random.Random(f"bound {self._seed} {share}")
        return self._yield(share) * draw.uniform(1, 1.5)

    def best(self, share: Share, floor: float) -> float:
        self.looks += 1
        found = self._yield(share)
        return found if found > floor else 0.0


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7), st.sampled_from([None, 1, 2]))
@settings(max_examples=60)
def test_the_best_division_of_a_table_is_found(
    seed: int, num_sites: int, streams: int, num_pipelines: int | None
) -> None:
    table = Table(seed)
    found = best_division(table, num_sites, streams, num_pipelines=num_pipelines)
    most = 0.0
    for groups in partitions(tuple(range(num_sites))):
        if num_pipelines not in (None, len(groups)):
            continue
        for counts in itertools.product(range(1, streams + 1), repeat=len(groups)):
            shares = [Share(*each) for each in zip(groups, counts, strict=True)]
            yields = [table.best(share, 0.0) for share in shares]
            if sum(counts) == streams and all(yields):
                most = max(most, sum(yields))
    if found is None:
        assert most == 0.0
        return
    assert found.is_best
    assert math.isclose(found.score, most)
    assert sum(share.streams for share in found.shares) == streams
    assert math.isclose(sum(table.best(share, 0.0) for share in found.shares), most)


def test_many_streams_are_given_away_in_portions_that_add_up() -> None:
    found = best_division(Table(3), 3, 1000, num_pipelines=2)
    assert found is not None
    assert sum(share.streams for share in found.shares) == 1000


def test_when_the_effort_is_spent_the_best_so_far_is_the_answer() -> None:
    table = Table(2)
    start = (Share(0b1, 4), Share(0b110, 4))
    score = sum(table.best(share, 0.0) for share in start)
    found = best_division(table, 3, 8, start=start, score=score, effort=0)
    assert found is not None
    assert (found.shares, found.is_best) == (start, False)


def test_streams_are_shared_out_by_what_each_share_yields() -> None:
    import numpy as np

    rows = [np.array([-math.inf, 5.0, 6.0, 6.5]), np.array([-math.inf, 1.0, 4.0, 9.0])]
    assert shared_out(rows) == (9.0, (1, 2))


SIZES = [(2, 4, 2), (3, 3, 2), (3, 4, 2), (2, 3, 3)]


@pytest.mark.parametrize("seed", range(8))
def test_pipelines_are_as_good_as_brute_force(seed: int) -> None:
    num_nodes, num_layers, num_experts = SIZES[seed % len(SIZES)]
    placing = cluster_of_pipelines(
        seed,
        num_nodes=num_nodes,
        num_layers=num_layers,
        num_experts=num_experts,
        alike=seed % 2 == 0,
    )
    most = most_of_divisions(placing)
    planner = PipelinesPlanner(placing)
    assert math.isclose(sum(each.score for each in planner.found), most)
    assert planner.best_possible() == pytest.approx(most)
    # The quick bounds hold too, for several pipelines as for all that one may have.
    ceiling = Ceiling(placing)
    every = Share((1 << num_nodes) - 1, 3)
    assert max(ceiling.most_in_all(), ceiling.most(every)) >= most * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_guessed_divisions_use_every_device_and_stream_once(seed: int) -> None:
    placing = cluster_of_pipelines(
        seed,
        num_nodes=9,
        num_layers=4,
        num_experts=2,
        streams=20,
        alike=False,
    )
    sketch = Sketch(placing, Ceiling(placing))
    found = regrouped(sketch, 9, 20, most_pipelines=5, guesses=60)
    assert found
    for shares in found:
        assert sum(share.streams for share in shares) == 20
        assert sorted(n for share in shares for n in numbers(share.sites)) == list(range(9))
