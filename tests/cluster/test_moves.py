"""Small steps hold their own against the search over all sets of helpers."""

import pytest

from magnetar.cluster.search import search
from magnetar.cluster.search.contest import busiest, contenders
from magnetar.cluster.search.moves import improved
from magnetar.cluster.search.search import Search
from magnetar.tests.shared_experts import small_cluster


@pytest.mark.parametrize("seed", [3, 9, 19])
def test_steps_from_every_number_of_micro_batches_come_near_the_best_plan(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    placing = small_cluster(seed, num_nodes=6, num_layers=6, num_experts=2)
    searches = [Search(placing.problem(tokens)) for tokens in (8, 4, 3, 2, 1)]
    assert not searches[0].is_exact
    starts = contenders(searches, within=0.2)
    found, route = improved(searches, starts, throughput=True)[0]
    monkeypatch.setattr(search, "EXACT_SHARED", 6)
    best = busiest([each.problem for each in searches])
    assert best is not None
    most = best[1].tokens_per_s(best[0])
    assert 0.95 * most <= route.tokens_per_s(found.problem) <= most * (1 + 1e-9)


def test_every_search_keeps_its_own_best_route() -> None:
    placing = small_cluster(19, num_nodes=6, num_layers=6, num_experts=2)
    searches = [Search(placing.problem(tokens)) for tokens in (8, 4, 3, 2, 1)]
    found = improved(searches, contenders(searches, within=0.2), throughput=True)
    assert len({each for each, _ in found}) == len(found) > 1
    scores = [route.tokens_per_s(each.problem) for each, route in found]
    assert scores == sorted(scores, reverse=True)
