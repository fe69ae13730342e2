"""A route of the search as stages of a plan: which layers and experts each device holds."""

from collections.abc import Mapping

from ..plan import ExpertHost, ExpertIds, StagePlan
from ..search.placing import Placing
from ..search.problem import Problem, Route, helpers_of
from .expert_hosts import add_copies, choose_experts


def stage_plans(
    placing: Placing, problem: Problem, route: Route, threads: Mapping[str, int]
) -> tuple[StagePlan, ...]:
    """The stages of `route`, which was found for `problem`, with `threads` of each host for every
    device on it; without times."""
    spans = zip(route.sites, route.members, route.starts, route.ends, strict=True)
    return tuple(
        _stage(
            placing, number, *span, _shares(placing, problem, *span), problem.num_layers, threads
        )
        for number, span in enumerate(spans)
    )


def _stage(
    placing: Placing,
    number: int,
    home: int,
    members: int,
    start: int,
    end: int,
    shares: list[ExpertIds],
    num_layers: int,
    threads: Mapping[str, int],
) -> StagePlan:
    place = placing.places[home]
    cost, weights = placing.cost(home), placing.weights[placing.dtypes[home]]
    layers = range(start, end)

    def weight(experts: ExpertIds) -> int:
        return sum(
            cost.expert_bytes[layer] * len(ids) for layer, ids in zip(layers, experts, strict=True)
        )

    own, *others = shares or [()]
    held = sum(weights.layer_bytes[start:end])
    if shares:
        held = sum(cost.attention_bytes[start:end]) + weight(own)
    held += (start == 0) * weights.embeddings_bytes
    held += (end == num_layers) * weights.output_bytes
    kv_bytes = len(layers) * placing.kv_bytes
    helpers = []
    for other, experts in zip(helpers_of(home, members), others, strict=True):
        there, taken = placing.places[other], weight(experts)
        free = there.device.memory_bytes - taken - placing.helper_overhead_bytes(home)
        if any(experts):
            helpers.append(
                ExpertHost(
                    host=there.node.host,
                    device=there.device_name,
                    num_threads=threads[there.node.host],
                    weights_bytes=taken,
                    free_bytes=free,
                    workspace_bytes=placing.helper_overhead_bytes(home),
                    experts=experts,
                )
            )
    return StagePlan(
        index=number,
        host=place.node.host,
        device=place.device_name,
        first_layer=start,
        end_layer=end,
        has_embeddings=start == 0,
        has_output=end == num_layers,
        dtype=placing.dtypes[home],
        num_threads=threads[place.node.host],
        weights_bytes=held,
        kv_bytes=kv_bytes,
        free_bytes=place.device.memory_bytes - held - kv_bytes - placing.overhead_bytes(home),
        workspace_bytes=placing.overhead_bytes(home),
        experts=own if helpers else None,
        helpers=tuple(helpers),
    )


def _shares(
    placing: Placing, problem: Problem, home: int, members: int, start: int, end: int
) -> list[ExpertIds]:
    """Experts of every host, the home first, by layer; none where the home has them all."""
    if members == 1 << home:
        return []
    cost = placing.cost(home)
    variant = (start == 0) + 2 * (end == problem.num_layers)
    split = placing.split(home, members, problem.step_tokens)
    counts_KH = split.counts(variant, end - start).tolist()
    seats = placing.seats(home, members)
    rooms = split.spare(variant, end - start)
    rows = []
    for layer, counts in zip(range(start, end), counts_KH, strict=True):
        measured = placing.workload.popularity
        popularity = None if measured is None else measured[layer]
        held = choose_experts(
            cost, layer, seats, counts, tokens=problem.step_tokens, popularity=popularity
        )
        rows.append(held if popularity is None else add_copies(held, rooms, seats, popularity))
    return [tuple(tuple(held[host]) for held in rows) for host in range(len(seats))]
