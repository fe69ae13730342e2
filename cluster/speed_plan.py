"""Place a model where speeds are known: the search over the cost model, and what it predicts."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np

from ..fetcher.config import ModelConfig
from ..fetcher.tensors import TensorIndex
from .cost import (
    TOKEN_ID_BYTES,
    assumed_link,
    device_speed,
    embeddings_s,
    hop_s,
    known_links,
    layer_s,
    model_cost,
    output_s,
    prefill_layer_s,
    transfer_s,
)
from .footprint import footprint
from .place import Place, Seating, places_of
from .plan import ComputeDtype, Inventory, Link, Plan, Prediction, UnusedNode, Workload
from .search import Matrix, Problem, Route, Site, best_in_order, busiest, evaluate, fastest, stage_s
from .units import gigabytes, milliseconds

PREFILL_TOKENS = 1024
"""Length of the prompt whose time to the first token is predicted."""
MAX_EXPLAINED = 8
"""Unused nodes of different kinds that are each planned with, to say what using them would do."""


def speeds_known(inventory: Inventory, dtype: ComputeDtype) -> bool:
    """Whether every node has a device whose speed is known; only then speeds decide."""
    return all(
        any(device_speed(device, dtype) is not None for device in node.devices)
        for node in inventory.nodes
    )


class SpeedPlanner:
    """The planning problem of one model, inventory and workload, in seconds."""

    def __init__(
        self,
        config: ModelConfig,
        index: TensorIndex,
        inventory: Inventory,
        workload: Workload,
        dtype: ComputeDtype,
        *,
        kv_bytes: int,
    ) -> None:
        """`kv_bytes`: keys and values of one layer for the whole workload."""
        self._model = model_cost(config, index, dtype)
        self._weights = footprint(config, index, dtype)
        self._links = known_links(inventory)
        self._workload = workload
        self._dtype = dtype
        self._kv_bytes = kv_bytes
        self._places = tuple(
            place for place in places_of(inventory) if device_speed(place.device, dtype) is not None
        )
        self._problem_of = cache(self._problem)

    def seating(self) -> tuple[Seating, tuple[int, ...]] | None:
        """The best devices in their best order, with the end layer of each; None: nothing fits."""
        found = self._best()
        if found is None:
            return None
        _, route = found
        return tuple((self._places[site], 1) for site in route.sites), route.ends

    def problem(self, num_stages: int) -> Problem:
        """What is searched for that many stages; sites are the places of `places_of`."""
        if self._workload.objective == "latency":
            return self._problem_of(1)
        return self._problem_of(self._step_tokens(num_stages))

    def predicted(self, plan: Plan) -> Plan:
        """`plan` with its times. Stages that share a device count as if each had it alone."""
        place_number = {
            (place.node.host, place.device_name): number
            for number, place in enumerate(self._places)
        }
        seats = [(stage.host, stage.device) for stage in plan.stages]
        if not all(seat in place_number for seat in seats):
            return plan
        sites = [place_number[seat] for seat in seats]
        ends = [stage.end_layer for stage in plan.stages]
        objective = self._workload.objective
        tokens = self._step_tokens(len(sites))
        crowd, alone = self._problem_of(tokens), self._problem_of(1)
        together = evaluate(crowd, sites, ends)
        single = evaluate(alone, sites, ends)
        shown = alone if objective == "latency" else crowd
        stages = []
        for number, stage in enumerate(plan.stages):
            after = sites[(number + 1) % len(sites)]
            is_last = number == len(sites) - 1
            hops = shown.return_s if is_last else shown.hop_s
            one = stage_s(
                shown.sites[sites[number]], stage.first_layer, stage.end_layer, shown.num_layers
            )
            stages.append(replace(stage, step_s=one, hop_s=float(hops[sites[number], after])))
        slowest = max(range(len(stages)), key=lambda number: stages[number].step_s or 0.0)
        prompt = min(PREFILL_TOKENS, self._workload.max_context_tokens)
        prediction = Prediction(
            objective=objective,
            step_tokens=shown.step_tokens,
            round_trip_s=(single if objective == "latency" else together).round_trip_s,
            tokens_per_s=together.tokens_per_s(crowd),
            stream_tokens_per_s=1 / single.round_trip_s,
            prefill_s=self._prefill_s(sites, ends, prompt),
            prefill_tokens=prompt,
            bottleneck=slowest,
            assumed=self._assumed(sites),
        )
        return replace(plan, stages=tuple(stages), prediction=prediction)

    def unused(self, plan: Plan, smallest_bytes: int) -> tuple[UnusedNode, ...]:
        """Why each node without a stage has none: what the best plan with it would do."""
        used = {(stage.host, stage.device) for stage in plan.stages}
        hosts = {host for host, _ in used}
        sites = [
            number
            for stage in plan.stages
            for number, place in enumerate(self._places)
            if (place.node.host, place.device_name) == (stage.host, stage.device)
        ]
        problem = self.problem(len(sites))
        now = evaluate(problem, sites, [stage.end_layer for stage in plan.stages])
        told: dict[object, str] = {}
        reasons: dict[str, str] = {}
        for number, place in enumerate(self._places):
            host = place.node.host
            if host in hosts or host in reasons:
                continue
            if place.usable_bytes < smallest_bytes:
                reasons[host] = (
                    f"too small: {gigabytes(place.usable_bytes)} usable, one layer takes "
                    f"{gigabytes(smallest_bytes)}"
                )
                continue
            links = tuple(
                (problem.hop_s[number, site], problem.hop_s[site, number]) for site in sites
            )
            kind = (device_speed(place.device, self._dtype), place.usable_bytes, links)
            if kind not in told:
                told[kind] = (
                    self._with(number, sites, problem, now)
                    if len(told) < MAX_EXPLAINED
                    else self._slower(number, sites, problem)
                )
            reasons[host] = told[kind]
        return tuple(UnusedNode(host=host, reason=reasons[host]) for host in sorted(reasons))

    def _with(self, number: int, sites: list[int], problem: Problem, now: Route) -> str:
        routes = [
            best_in_order(
                problem,
                (*sites[:at], number, *sites[at:]),
                throughput=self._workload.objective == "throughput",
            )
            for at in range(len(sites) + 1)
        ]
        found = [route for route in routes if route is not None]
        if not found:
            return "not needed: no split with one layer or more on it fits"
        if self._workload.objective == "throughput":
            best = max(route.tokens_per_s(problem) for route in found)
            return (
                f"not needed: with it at best {best:.1f} tokens/s in place of "
                f"{now.tokens_per_s(problem):.1f}"
            )
        least = min(route.round_trip_s for route in found)
        return (
            f"not needed: with it a token takes {milliseconds(least)} in place of "
            f"{milliseconds(now.round_trip_s)}"
        )

    def _slower(self, number: int, sites: list[int], problem: Problem) -> str:
        def per_layer(site: int) -> float:
            return float(problem.sites[site].seconds_L[-1]) / problem.num_layers

        used = sorted(per_layer(site) for site in sites)
        return (
            f"not needed: a layer takes {milliseconds(per_layer(number))} there, "
            f"{milliseconds(used[0])} to {milliseconds(used[-1])} on the nodes that are used"
        )

    def _best(self) -> tuple[Problem, Route] | None:
        asked = self._workload.num_stages
        if not self._places:
            return None
        if self._workload.objective == "throughput":
            return busiest(
                self.problem,
                num_sites=len(self._places),
                num_stages=asked,
            )
        problem = self.problem(1)
        route = fastest(problem, num_stages=asked)
        return None if route is None else (problem, route)

    def _step_tokens(self, num_stages: int) -> int:
        """As the scheduler does: one step more is in flight than there are stages."""
        return -(-self._workload.max_concurrency // (num_stages + 1))

    def _problem(self, tokens: int) -> Problem:
        places, model = self._places, self._model
        hosts = [place.node.host for place in places]
        links = {(a, b): self._link(a, b) for a in set(hosts) for b in set(hosts)}
        hidden, ids = tokens * model.hidden_bytes, tokens * TOKEN_ID_BYTES

        def matrix(of: dict[tuple[str, str], float]) -> Matrix:
            return np.array([[of[a, b] for b in hosts] for a in hosts])

        return Problem(
            sites=tuple(self._site(place, tokens) for place in places),
            hop_s=matrix({pair: hop_s(hidden, link) for pair, link in links.items()}),
            return_s=matrix({pair: hop_s(ids, link) for pair, link in links.items()}),
            transfer_s=matrix({pair: transfer_s(hidden, link) for pair, link in links.items()}),
            step_tokens=tokens,
            streams=self._workload.max_concurrency,
        )

    def _site(self, place: Place, tokens: int) -> Site:
        model, weights = self._model, self._weights
        speed = device_speed(place.device, self._dtype)
        assert speed is not None
        context = max(1, self._workload.max_context_tokens // 2)
        seconds = [
            layer_s(model, layer, speed, tokens=tokens, context_tokens=context)
            for layer in range(len(weights.layer_bytes))
        ]
        needs = [each + self._kv_bytes for each in weights.layer_bytes]
        overhead = weights.workspace_bytes(self._workload.max_context_tokens)
        return Site(
            seconds_L=np.concatenate([[0.0], np.cumsum(seconds)]),
            needs_L=np.concatenate([[0.0], np.cumsum(needs, dtype=np.float64)]),
            capacity=place.usable_bytes - overhead,
            first_s=embeddings_s(model, speed, tokens=tokens),
            last_s=output_s(model, speed, tokens=tokens),
            first_bytes=weights.embeddings_bytes,
            last_bytes=weights.output_bytes,
        )

    def _prefill_s(self, sites: list[int], ends: list[int], tokens: int) -> float:
        model, total, start = self._model, 0.0, 0
        for number, (site, end) in enumerate(zip(sites, ends, strict=True)):
            place = self._places[site]
            speed = device_speed(place.device, self._dtype)
            assert speed is not None
            total += sum(
                prefill_layer_s(model, layer, speed, tokens=tokens) for layer in range(start, end)
            )
            if end == len(model.expert_bytes):
                total += output_s(model, speed, tokens=1)
            if number:
                before = self._places[sites[number - 1]].node.host
                total += hop_s(tokens * model.hidden_bytes, self._link(before, place.node.host))
            start = end
        return total

    def _link(self, source: str, target: str) -> Link:
        return self._links.get((source, target)) or assumed_link(source, target)

    def _assumed(self, sites: list[int]) -> tuple[str, ...]:
        hosts = [self._places[site].node.host for site in sites]
        missing = [
            f"{a} to {b}" for a, b in pairwise(hosts) if a != b and (a, b) not in self._links
        ]
        said = [f"half of the context ({self._workload.max_context_tokens // 2} tokens) is in use"]
        if missing:
            link = assumed_link("a", "b")
            said.append(
                f"1 GbE ({milliseconds(link.rtt_s)} round trip) where no link was measured: "
                + ", ".join(missing)
            )
        return tuple(said)
