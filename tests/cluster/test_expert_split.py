"""How layers share their experts: held to every pair of options and every number of layers."""

from __future__ import annotations

import numpy as np
import pytest

from magnetar.cluster.search.expert_split import Split

NUM_LAYERS, NUM_EXPERTS = 12, 6


@pytest.mark.parametrize("seed", range(6))
def test_no_pair_of_options_is_quicker_than_the_split_that_was_mixed(seed: int) -> None:
    draw = np.random.default_rng(seed)
    counts_OH = np.array([[a, b, 6 - a - b] for a in range(7) for b in range(7 - a)])
    counts_OH = counts_OH[draw.choice(len(counts_OH), 8, replace=False)]
    # Whole seconds, so that options tie.
    seconds_O = draw.integers(1, 6, len(counts_OH)).astype(float)
    home_VK = draw.integers(10, 60, (4, 1)) - np.arange(NUM_LAYERS + 1)
    helper_rooms = [int(room) for room in draw.integers(25, 50, 2)]
    split = Split(seconds_O, counts_OH, home_VK=home_VK, helper_rooms=helper_rooms)
    for variant, k in np.ndindex(4, NUM_LAYERS + 1):
        if not k:
            continue
        rooms = [home_VK[variant, k], *helper_rooms]
        least = min(
            (
                seconds_O[one] * at + seconds_O[other] * (k - at)
                for one in range(8)
                for other in range(8)
                for at in range(k + 1)
                if np.all(counts_OH[one] * at + counts_OH[other] * (k - at) <= rooms)
            ),
            default=np.inf,
        )
        assert split.seconds_VK[variant, k] == pytest.approx(least)
        if np.isfinite(least):
            counts = split.counts(variant, k)
            assert len(counts) == k
            assert (counts.sum(axis=1) == NUM_EXPERTS).all()
            assert min(split.spare(variant, k)) >= 0
