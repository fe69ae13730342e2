"""How long stages take when some experts are needed more often than others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product

import numpy as np

from ..plan import StagePlan
from ..search.cost import attention_s, chunk_context, experts_s
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
    site = placing.problem(tokens).sites[home]
    seconds = stage.has_embeddings * site.first_s + stage.has_output * site.last_s
    experts_of = _experts_time(placing, stage, places, popularity)
    for layer in range(stage.first_layer, stage.end_layer):
        seconds += placing.attention_L(home, tokens)[layer]
        seconds += mean(placing.mixes(tokens), partial(experts_of, layer))
    return float(seconds)


def popular_chunk_s(
    placing: Placing,
    stage: StagePlan,
    places: Sequence[int],
    position: int,
    count: int,
    popularity: Popularity,
) -> float:
    """A chunk of a prompt alone, from that token on, in a stage with the experts where they are."""
    home = places[0]
    cost, speed = placing.cost(home), placing.speed(home)
    experts_of = _experts_time(placing, stage, places, popularity)
    seconds = placing.places[home].device.step_overhead_s
    for layer in range(stage.first_layer, stage.end_layer):
        seconds += attention_s(
            cost,
            layer,
            speed,
            tokens=0,
            context_tokens=0,
            prompt_tokens=count,
            prompt_context_tokens=chunk_context(position, count),
        )
        seconds += experts_of(layer, count)
    return seconds


def _experts_time(
    placing: Placing, stage: StagePlan, places: Sequence[int], popularity: Popularity
) -> Callable[[int, int], float]:
    """Of a layer's experts for so many tokens, with the ways to helpers and back."""
    home = places[0]
    cost, seats = placing.cost(home), [placing.seat(home, place) for place in places]

    def experts_of(layer: int, count: int) -> float:
        if not stage.helpers:
            shares = popularity[layer]
            return experts_s(cost, layer, seats[0].speed, tokens=count, popularity=shares)
        held_OHE = np.array(_ways(stage, layer, cost.num_experts))
        weights = token_weights(tuple(popularity[layer]), cost.experts_per_token)
        spread = hosts_s(cost, layer, seats, held_OHE, tokens=count, weights=weights)
        return float(spread.min())

    return experts_of


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
