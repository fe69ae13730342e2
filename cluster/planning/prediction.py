"""The times that a pipeline should have under the cost model, and what was assumed for them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..footprint import STEP_TOKENS
from ..plan import ExpertHost, Pipeline, Prediction
from ..search.cost import assumed_link, hop_s
from ..search.expert_cost import Array
from ..search.mix import PROMPT_TOKENS, mean
from ..search.placing import Placing
from ..search.problem import Problem, evaluate, sites_of
from ..units import milliseconds
from .popular_times import Popularity, popular_chunk_s, popular_stage_s

PREFILL_TOKENS = 1024
"""Length of the prompt whose time to the first token is predicted."""


def predicted(placing: Placing, pipeline: Pipeline) -> Pipeline:
    """`pipeline` with its times, of stages without helpers or those of the best route. Stages
    that share a device take turns there."""
    number_of = {(p.node.host, p.device_name): n for n, p in enumerate(placing.places)}
    seats = [
        [(s.host, s.device), *((h.host, h.device) for h in s.helpers)] for s in pipeline.stages
    ]
    if not all(seat in number_of for stage in seats for seat in stage):
        return pipeline
    sites = [number_of[stage[0]] for stage in seats]
    members = [sum(1 << number_of[seat] for seat in stage) for stage in seats]
    ends = [stage.end_layer for stage in pipeline.stages]
    objective = placing.workload.objective
    # Only the goal of throughput searches for the size of a step.
    num_steps = len(set(sites))
    if objective == "throughput" and pipeline.num_micro_batches is not None:
        num_steps = pipeline.num_micro_batches
    crowd = placing.problem(-(-placing.workload.max_concurrency // num_steps))
    alone = placing.problem(1)
    places = [[number_of[seat] for seat in stage] for stage in seats]
    together, single = (
        evaluate(each, sites, ends, members, _stages_s(placing, pipeline, places, each, members))
        for each in (crowd, alone)
    )
    shown, trip = (crowd, together) if objective == "throughput" else (alone, single)
    stages = []
    for number, stage in enumerate(pipeline.stages):
        after = sites[(number + 1) % len(sites)]
        hops = shown.return_s if number == len(sites) - 1 else shown.hop_s
        stages.append(
            replace(
                stage,
                step_s=trip.stages_s[number],
                hop_s=float(hops[sites[number], after]),
                helpers=tuple(
                    _timed(placing, helper, sites[number], number_of, shown.step_tokens)
                    for helper in stage.helpers
                ),
            )
        )
    prompt = min(PREFILL_TOKENS, placing.workload.max_context_tokens)
    popularity = placing.workload.popularity or _all_alike(placing)

    def chunk_s(number: int, position: int, count: int) -> float:
        stage, there = pipeline.stages[number], places[number]
        return popular_chunk_s(placing, stage, there, position, count, popularity)

    prediction = Prediction(
        objective=objective,
        step_tokens=shown.step_tokens,
        round_trip_s=trip.round_trip_s,
        tokens_per_s=together.tokens_per_s(crowd),
        stream_tokens_per_s=1 / single.round_trip_s,
        prefill_s=placing.prefill_s(
            sites,
            ends,
            prompt,
            step_tokens=pipeline.max_step_tokens or STEP_TOKENS,
            chunk_s=chunk_s if any(stage.helpers for stage in pipeline.stages) else None,
        ),
        prefill_tokens=prompt,
        assumed=_assumed(placing, sites, members),
    )
    micro_batches = -(-placing.workload.max_concurrency // crowd.step_tokens)
    return replace(
        pipeline,
        stages=tuple(stages),
        prediction=prediction,
        num_micro_batches=micro_batches,
    )


def _all_alike(placing: Placing) -> Popularity:
    cost = placing.cost(0)
    share = cost.experts_per_token / max(1, cost.num_experts)
    return ((share,) * cost.num_experts,) * len(cost.expert_bytes)


def _stages_s(
    placing: Placing,
    pipeline: Pipeline,
    places: Sequence[Sequence[int]],
    problem: Problem,
    members: Sequence[int],
) -> list[float] | None:
    """Seconds of every stage under the popularity of experts, or where all are alike in steps of
    the plan's size; None: as the problem has them."""
    popularity, tokens = placing.workload.popularity, problem.step_tokens
    sized = placing
    if pipeline.max_step_tokens is not None:
        sized = placing.in_steps_of(pipeline.max_step_tokens)
    if popularity is not None:
        return [
            popular_stage_s(sized, stage, there, tokens, popularity)
            for stage, there in zip(pipeline.stages, places, strict=True)
        ]
    sites, ends = [there[0] for there in places], [stage.end_layer for stage in pipeline.stages]
    route = evaluate(problem, sites, ends, members)
    if sized is placing or not math.isfinite(route.round_trip_s):
        return None

    def step_S(count: int) -> Array:
        return np.array(placing.step_s(route, decoded=tokens, tokens=count)[0])

    found: list[float] = mean(sized.mixes(tokens), step_S).tolist()
    return found


def _timed(
    placing: Placing,
    helper: ExpertHost,
    home: int,
    number_of: dict[tuple[str, str], int],
    tokens: int,
) -> ExpertHost:
    cost = placing.cost(home)
    number = number_of[helper.host, helper.device]
    speed = placing.speed(number, placing.dtypes[home])
    share = 1 - (1 - cost.experts_per_token / cost.num_experts) ** tokens
    read = helper.weights_bytes * share / (speed.read_gbps * 1e9)
    rows = tokens * cost.hidden_bytes
    outputs = rows * cost.experts_per_token
    there, back = placing.link(home, number), placing.link(number, home)
    way_s = hop_s(rows, there) + hop_s(outputs, back) + placing.speed(home).helper_overhead_s
    return replace(helper, step_s=read, hop_s=way_s)


def _assumed(placing: Placing, sites: list[int], members: list[int]) -> tuple[str, ...]:
    said = [f"half of the context ({placing.workload.max_context_tokens // 2} tokens) is in use"]
    if placing.workload.objective == "throughput":
        said.append(f"{PROMPT_TOKENS:g} token of prompts comes with every token generated")
    if missing := placing.unmeasured(sites, members):
        link = assumed_link("a", "b")
        said.append(
            f"1 GbE ({milliseconds(link.rtt_s)} round trip) where no link was measured: "
            + ", ".join(missing)
        )
    used = [
        placing.places[site] for at in zip(sites, members, strict=True) for site in sites_of(*at)
    ]
    nodes = {place.node.host: place.node for place in used}
    said += [
        f"{node.host} is as fast as it was measured, beside other work on "
        f"{node.busy_share * 100:.0f} % of its processors"
        for node in nodes.values()
        if node.was_busy
    ]
    return (*said, *dict.fromkeys(place.device.assumed for place in used if place.device.assumed))
