"""From counts of experts to the probabilities that the cost model takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.planning.popularity import popularity_of
from magnetar.tests.planning import model

CONFIG, _ = model(n_layers=3, dim=128)


@given(
    st.dictionaries(
        st.integers(0, 2),
        st.lists(st.lists(st.integers(0, 7), unique=True, min_size=2, max_size=2)),
    )
)
def test_shares_of_real_traffic_are_probabilities(chosen: dict[int, list[list[int]]]) -> None:
    counts = {
        layer: [sum(expert in token for token in tokens) for expert in range(8)]
        for layer, tokens in chosen.items()
    }
    found = popularity_of(counts, CONFIG)
    assert len(found) == 3
    for shares in found:
        assert sum(shares) == pytest.approx(2)
        assert all(0 < share <= 1 for share in shares)


def test_much_traffic_gives_what_was_counted_and_none_gives_equal_shares() -> None:
    found = popularity_of({1: (1_000_000, 500_000, 500_000, 0, 0, 0, 0, 0)}, CONFIG)
    assert found[0] == found[2] == (0.25,) * 8
    assert found[1][:4] == pytest.approx((1.0, 0.5, 0.5, 0.0), abs=1e-4)


@pytest.mark.parametrize("counts", [(1, 2), (-1,) * 8])
def test_counts_of_another_model_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of layer 1"):
        popularity_of({1: counts}, CONFIG)
