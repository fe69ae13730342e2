"""How long stages take when some experts are needed more often than others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice, product

import numpy as np

from ..plan import StagePlan
from ..search.cost import experts_s
from ..search.expert_cost import hosts_s, token_weights
from ..search.mix import mean
from ..search.placing import Placing

Popularity = Sequence[Sequence[float]]
"""Of each layer, how often a token needs each expert."""
_MOST_WAYS = 64


def popular_stage_s(
    placing: Placing, stage: StagePlan, places: Sequence[int], tokens: int, popularity: Popularity
) -> float:
    """One decode step of a stage with the experts where they are, and the prompts that come along.

    `places` are those of the stage's own device and of its helpers.
    """
    home = places[0]
    cost, site = placing.cost(home), placing.problem(tokens).sites[home]
    seconds = stage.has_embeddings * site.first_s + stage.has_output * site.last_s
    seats = [placing.seat(home, place) for place in places]

    def experts_of(layer: int, count: int) -> float:
        if not stage.helpers:
            shares = popularity[layer]
            return experts_s(cost, layer, seats[0].speed, tokens=count, popularity=shares)
        held_OHE = np.array(_ways(stage, layer, cost.num_experts))
        weights = token_weights(tuple(popularity[layer]), cost.experts_per_token)
        spread = hosts_s(cost, layer, seats, held_OHE, tokens=count, weights=weights)
        return float(spread.min())

    for layer in range(stage.first_layer, stage.end_layer):
        seconds += placing.attention_L(home, tokens)[layer]
        seconds += mean(placing.mixes(tokens), partial(experts_of, layer))
    return float(seconds)


def _ways(stage: StagePlan, layer: int, num_experts: int) -> list[list[list[int]]]:
    """[O, H, E]: who may compute which expert; of many ways with copies, the first ones.

    Rows really go to whichever holder has least to do, step by step; that is about as good as the
    best of these ways for all steps.
    """
    holders = [stage.holders(layer, expert) for expert in range(num_experts)]
    hosts = range(-1, len(stage.helpers))
    return [
        [[int(chosen == host) for chosen in way] for host in hosts]
        for way in islice(product(*holders), _MOST_WAYS)
    ]
