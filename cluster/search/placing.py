"""From machines and a model to a placement problem: sites, links, and stages with helpers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..machines import ComputeDtype
from .cost import (
    TOKEN_ID_BYTES,
    ModelCost,
    Speed,
    attention_s,
    embeddings_s,
    hop_s,
    layer_s,
    output_s,
)
from .expert_cost import (
    Array,
    Seat,
    expert_rows_bytes,
    hit_chance,
    hosts_s,
    least_hosts_s,
    one_expert_s,
)
from .expert_split import Split, in_turn, spreads
from .mix import mean
from .placed_model import PlacedModel, prefix_sums
from .problem import Least, Matrix, Problem, Route, Site, helpers_of


class Placing(PlacedModel):
    """The placement problems of one model on some places, one per number of sequences in a step."""

    def _begin(self) -> None:
        super()._begin()
        self.problem = cache(self._problem)
        self.split = cache(self._split)
        self.least_layer_L = cache(self._least_layer_L)
        """Seconds of each layer at least, with the best help that any of `members` can give, as
        ``least_layer_L(home, members, tokens)``."""
        self.least_experts_s = cache(self._least_experts_s)
        """Of the experts of a layer of some size alone."""
        self.splits_are_exact = True
        """Of all that were asked for so far."""

    def _problem(self, tokens: int) -> Problem:
        """At so many sequences per step; sites are the places."""
        overhead_s, rtt_s, gbps = self.ways()
        # The hidden state is bf16 whatever the stages.
        carried = mean(self.mixes(tokens), float)
        hidden = carried * next(iter(self.costs.values())).hidden_bytes
        ids = tokens * TOKEN_ID_BYTES

        def shared(home: int, members: int) -> Matrix:
            return self.shared_LL(home, members, tokens)

        def least() -> Least:
            return self._least(tokens)

        # A step leaves a stage when what surrounds its layers is done too.
        around = np.array([[place.device.step_overhead_s] for place in self.places])
        may_share = self._may_share
        return Problem(
            sites=tuple(self._site(number, tokens) for number in range(len(self.places))),
            hop_s=around + (overhead_s + rtt_s / 2 + hidden / (gbps * 1e9)),
            return_s=around + (overhead_s + rtt_s / 2 + ids / (gbps * 1e9)),
            transfer_s=hidden / (gbps * 1e9),
            step_tokens=tokens,
            streams=self.workload.max_concurrency,
            shared=shared if may_share else None,
            least_shared=least if may_share else None,
        )

    def _site(self, number: int, tokens: int) -> Site:
        cost, weights, speed = self.cost(number), self.footprint_of(number), self.speed(number)
        needs = [each + self.kv_bytes for each in weights.layer_bytes]
        return Site(
            seconds_L=self.seconds_L(number, tokens),
            needs_L=prefix_sums(needs),
            capacity=self.places[number].usable_bytes - self.overhead_bytes(number),
            first_s=mean(self.mixes(tokens), lambda n: embeddings_s(cost, speed, tokens=n)),
            last_s=output_s(cost, speed, tokens=tokens),
            first_bytes=weights.embeddings_bytes,
            last_bytes=weights.output_bytes,
            span=self.spans.get(self.host(number)),
        )

    def shared_LL(self, home: int, members: int, tokens: int) -> Matrix:
        """[u, v]: seconds of a stage whose members share the experts of layers [u, v)."""
        site, split = self.problem(tokens).sites[home], self.split(home, members, tokens)
        attention = prefix_sums(self.attention_L(home, tokens))
        inner_K, first_K, last_K, whole_K = split.seconds_VK
        # Row u begins u later: v - u layers, and no stage has less than one.
        by_length = np.concatenate([np.full(len(inner_K), np.inf), inner_K[1:]])
        experts = sliding_window_view(by_length, len(inner_K))[::-1].copy()
        experts[0, 1:] = first_K[1:] + site.first_s
        experts[:-1, -1] = last_K[:0:-1] + site.last_s
        experts[0, -1] = whole_K[-1] + site.first_s + site.last_s
        found: Matrix = attention[None, :] - attention[:, None] + experts
        return found

    def step_s(self, route: Route, *, decoded: int, tokens: int) -> tuple[list[float], list[float]]:
        """Seconds of every stage of a route in a step of `tokens` tokens, and of the ways from each
        to the next and back, experts being where the search for steps with `decoded` sequences
        puts them."""
        spans = zip(route.sites, route.members, route.starts, route.ends, strict=True)
        stages_s = [self._stage_step_s(*span, decoded, tokens) for span in spans]
        hidden = tokens * self.cost(0).hidden_bytes
        ends = (*route.sites[1:], route.sites[0])
        ways_s = [
            self.places[a].device.step_overhead_s
            + hop_s(hidden if at else decoded * TOKEN_ID_BYTES, self.link(a, b))
            for at, a, b in zip(range(len(ends) - 1, -1, -1), route.sites, ends, strict=True)
        ]
        return stages_s, ways_s

    def _stage_step_s(
        self, home: int, members: int, start: int, end: int, decoded: int, tokens: int
    ) -> float:
        cost, speed, layers = self.cost(home), self.speed(home), end - start
        is_first, is_last = start == 0, end == len(cost.expert_bytes)
        seconds = is_first * embeddings_s(cost, speed, tokens=tokens)
        seconds += is_last * output_s(cost, speed, tokens=decoded)
        if members == 1 << home:
            layers_s = self.layers_s(home, decoded, tokens, layer_s)
            return seconds + float(layers_s[end] - layers_s[start])
        attention_L = self.layers_s(home, decoded, tokens, attention_s)
        seconds += float(attention_L[end] - attention_L[start])
        split = self.split(home, members, decoded)
        counts = split.counts(is_first + 2 * is_last, layers)
        for row, times in Counter(map(tuple, counts.tolist())).items():
            seconds += times * self._spread_s(home, members, row, tokens)
        return seconds

    def _spread_s(self, home: int, members: int, counts: tuple[int, ...], tokens: int) -> float:
        """A layer's experts, so many on each member."""
        key = (self.sharing_key(home, members), counts, tokens)
        if key not in self.known:
            cost, seats = self.cost(home), self.seats(home, members)
            layer = cost.expert_bytes.index(max(cost.expert_bytes))
            held_OHE = in_turn(np.array([counts]), cost.num_experts)
            self.known[key] = float(hosts_s(cost, layer, seats, held_OHE, tokens=tokens)[0])
        found: float = self.known[key]
        return found

    @property
    def _may_share(self) -> bool:
        has_experts = bool(next(iter(self.costs.values())).num_experts)
        return has_experts and self.workload.separate_experts

    def _split(self, home: int, members: int, tokens: int) -> Split:
        """How the members of a stage share its experts, for every number of layers; by whether the
        stage begins (1) and ends (2) the model."""
        cost, site = self.cost(home), self.problem(tokens).sites[home]
        expert = max(cost.expert_bytes)
        seconds_O, counts_OH = self._spreads(home, members, tokens)
        layers = np.arange(len(cost.expert_bytes) + 1)
        used = layers * (max(cost.attention_bytes) + self.kv_bytes)
        ends = [0.0, site.first_bytes, site.last_bytes, site.first_bytes + site.last_bytes]
        home_VK = np.array([np.floor((site.capacity - used - end) / expert) for end in ends])
        overhead = self.helper_overhead_bytes(home)
        rooms = [
            max(0, (self.places[other].usable_bytes - overhead) // expert)
            for other in helpers_of(home, members)
        ]
        key = (self._spreads_key(home, members, tokens), home_VK.tobytes(), *rooms)
        if key not in self.known:
            self.known[key] = Split(seconds_O, counts_OH, home_VK=home_VK, helper_rooms=rooms)
        found: Split = self.known[key]
        self.splits_are_exact &= found.is_exact
        return found

    def _spreads_key(self, home: int, members: int, tokens: int) -> tuple[object, ...]:
        return self.sharing_key(home, members), tokens, self._size, self.workload.objective

    def _spreads(self, home: int, members: int, tokens: int) -> tuple[Array, Array]:
        """Seconds of a layer's experts by the way they are spread, and the ways."""
        key = self._spreads_key(home, members, tokens)
        if key not in self.known:
            cost, seats = self.cost(home), self.seats(home, members)
            layer = cost.expert_bytes.index(max(cost.expert_bytes))
            solo = partial(self._solo_HN, cost, layer, seats, tokens)
            counts_OH = spreads(cost.num_experts, len(seats), solo)
            held_OHE = in_turn(counts_OH, cost.num_experts)
            shared = self.sharing_key(home, members), counts_OH.tobytes()

            def seconds_of(count: int) -> Array:
                if (*shared, count) not in self.known:
                    found = hosts_s(cost, layer, seats, held_OHE, tokens=count)
                    self.known[*shared, count] = found
                known: Array = self.known[*shared, count]
                return known

            seconds_O = mean(self.mixes(tokens), seconds_of)
            self.known[key] = seconds_O, counts_OH
        found: tuple[Array, Array] = self.known[key]
        return found

    def _solo_HN(self, cost: ModelCost, layer: int, seats: Sequence[Seat], tokens: int) -> Array:
        """[H, n]: what n experts take on each seat, were the others for nothing."""
        num_experts = cost.num_experts
        rest = Seat(speed=Speed(read_gbps=1e9))
        counts = np.array([[n, num_experts - n] for n in range(num_experts + 1)])
        held = in_turn(counts, num_experts)
        return np.array([hosts_s(cost, layer, [seat, rest], held, tokens=tokens) for seat in seats])

    def _least(self, tokens: int) -> Least:
        """What layers cost at least when their experts may be anywhere."""
        count = range(len(self.places))
        mixes = self.mixes(tokens)
        own, own_bytes, layer, expert, one_expert = [], [], [], [], []
        for home in count:
            cost = self.cost(home)
            own.append(self.attention_L(home, tokens))
            own_bytes.append(np.array(cost.attention_bytes) + self.kv_bytes)
            layer.append(self.least_layer_L(home, (1 << len(count)) - 1, tokens))
            one_expert.append(mean(mixes, partial(self._least_expert_L, home)))
            expert.append(mean(mixes, partial(self._busy_expert_L, home)))
        overhead = min(each.workspace_bytes(0) for each in self.weights.values())
        # What a host is asked for, and rows of an expert, as `expert_cost.py` has them.
        overhead_s, rtt_s, gbps = self.ways()
        away = ~np.eye(len(count), dtype=bool)
        home_s = np.array([[self.speed(home).helper_overhead_s] for home in count])
        asked_NN = mean(mixes, lambda _: 1.0) * (2 * overhead_s + rtt_s + home_s) * away
        rows_NN = away * mean(mixes, lambda n: expert_rows_bytes(cost, tokens=n) / (gbps * 1e9))
        return Least(
            layer_NL=np.array(layer),
            own_NL=np.array(own),
            expert_NL=np.array(expert),
            one_expert_NL=np.array(one_expert),
            own_bytes_NL=np.array(own_bytes),
            expert_bytes_L=np.min([cost.expert_bytes for cost in self.costs.values()], axis=0),
            helper_capacity_N=np.array([place.usable_bytes - overhead for place in self.places]),
            asked_NN=asked_NN,
            rows_NN=rows_NN,
            num_experts=self.cost(0).num_experts,
        )

    def _least_layer_L(self, home: int, members: int, tokens: int) -> Matrix:
        if not self._may_share:
            return np.diff(self.seconds_L(home, tokens))
        sizes = self.cost(home).expert_bytes
        by_size = {
            size: mean(self.mixes(tokens), partial(self.least_experts_s, home, members, size))
            for size in set(sizes)
        }
        return np.array(self.attention_L(home, tokens)) + [by_size[size] for size in sizes]

    def _least_experts_s(self, home: int, members: int, size: int, tokens: int) -> float:
        cost = self.cost(home)
        helpers = [n for n in helpers_of(home, members) if self.spans.get(self.host(n)) is None]
        seats = [self.seat(home, site) for site in (home, *helpers)]
        every, layer = np.ones((1, len(seats)), dtype=bool), cost.expert_bytes.index(size)
        return float(least_hosts_s(cost, layer, seats, every, tokens=tokens)[0])

    def _least_expert_L(self, number: int, tokens: int) -> Matrix:
        """In whichever dtype is quickest."""
        found: Matrix = np.min(
            [self._one_expert_L(number, dtype, tokens) for dtype in self.costs], axis=0
        )
        return found

    def _busy_expert_L(self, number: int, tokens: int) -> Matrix:
        return hit_chance(self.cost(number), tokens) * self._least_expert_L(number, tokens)

    def _one_expert_L(self, number: int, dtype: ComputeDtype, tokens: int) -> Matrix:
        cost, speed = self.costs[dtype], self.speed(number, dtype)
        by_size = {
            size: one_expert_s(cost, cost.expert_bytes.index(size), speed, tokens=tokens)
            for size in set(cost.expert_bytes)
        }
        return np.array([by_size[size] for size in cost.expert_bytes])
