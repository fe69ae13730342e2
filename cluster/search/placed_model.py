"""A model on some places: what it weighs and takes on each, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np

from ..footprint import STEP_TOKENS, Footprint
from ..machines import ComputeDtype, Inventory, Link
from ..plan import Workload
from .cost import (
    TOKEN_ID_BYTES,
    ModelCost,
    Speed,
    assumed_link,
    attention_s,
    chunk_context,
    device_speed,
    hop_s,
    known_links,
    layer_s,
    output_s,
    prefill_layer_s,
)
from .expert_cost import Seat
from .mix import PROMPT_TOKENS, Mix, mean, mix, sizes
from .place import Place
from .problem import Matrix, helpers_of, sites_of
from .weighed import WeighedModel


class LayerSeconds(Protocol):
    """A term of the cost of a layer in a step."""

    def __call__(
        self,
        model: ModelCost,
        layer: int,
        speed: Speed,
        *,
        tokens: int,
        context_tokens: float,
        prompt_tokens: int = 0,
        prompt_context_tokens: float = 0.0,
    ) -> float:
        """As `attention_s`."""
        ...


class PlacedModel:
    """The costs of one model on some places, each at a dtype of its own."""

    def __init__(
        self,
        model: WeighedModel,
        inventory: Inventory,
        workload: Workload,
        places: Sequence[Place],
        dtypes: Sequence[ComputeDtype],
        *,
        kv_bytes: int,
    ) -> None:
        """`kv_bytes`: keys and values of one layer for the whole workload."""
        self.weights = {dtype: model.footprint(dtype) for dtype in set(dtypes)}
        self.costs = {dtype: model.cost(dtype) for dtype in self.weights}
        self._links = known_links(inventory)
        self._size: int | None = None
        """Of steps with prompts; None: whichever is best."""
        self.spans = {wish.host: wish.layers for wish in workload.nodes}
        self.known = model.known
        self._sit(places, dtypes, workload, kv_bytes)

    def _sit(
        self,
        places: Sequence[Place],
        dtypes: Sequence[ComputeDtype],
        workload: Workload,
        kv_bytes: int,
    ) -> None:
        self.places, self.dtypes = tuple(places), tuple(dtypes)
        self.workload, self.kv_bytes = workload, kv_bytes
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet of these places together."""
        self.attention_L = cache(self._attention_L)
        self.seat = cache(self._seat)
        """One of the hosts of a stage's experts: the home itself, or a helper behind its link, as
        ``seat(home, site)``."""
        self.ways = cache(self._ways)
        self._cut: dict[int, Any] = {}

    def part(self, numbers: Sequence[int], streams: int) -> Self:
        """The same on some of the places alone, and for so many streams."""
        return self._other(numbers, replace(self.workload, max_concurrency=streams))

    def in_steps_of(self, size: int) -> Self:
        """The same with steps of at most so many tokens, prompts among them."""
        if size not in self._cut:
            self._cut[size] = self._other(range(len(self.places)), self.workload)
            self._cut[size]._size = size
        found: Self = self._cut[size]
        return found

    def _other(self, numbers: Sequence[int], workload: Workload) -> Self:
        other = copy(self)
        other._sit(
            [self.places[number] for number in numbers],
            [self.dtypes[number] for number in numbers],
            workload,
            self.kv_bytes_for(workload.max_concurrency),
        )
        return other

    def kv_bytes_for(self, streams: int) -> int:
        """Keys and values of one layer."""
        return self.kv_bytes // self.workload.max_concurrency * streams

    def cost(self, number: int) -> ModelCost:
        """The model at the dtype of a place."""
        return self.costs[self.dtypes[number]]

    def speed(self, number: int, dtype: ComputeDtype | None = None) -> Speed:
        """Of a place, at its own dtype or that of the stage it helps."""
        found = device_speed(self.places[number].device, dtype or self.dtypes[number])
        assert found is not None
        return found

    def link(self, number: int, other: int) -> Link:
        """Between two places; assumed where nobody measured."""
        hosts = self.host(number), self.host(other)
        return self._links.get(hosts) or assumed_link(*hosts)

    def _ways(self) -> tuple[Matrix, Matrix, Matrix]:
        """[i, j] of the links between places: overhead, round trip and gigabytes per second."""
        count = range(len(self.places))
        links = [[self.link(a, b) for b in count] for a in count]
        return (
            np.array([[link.overhead_s for link in row] for row in links]),
            np.array([[link.rtt_s for link in row] for row in links]),
            np.array([[link.gbps for link in row] for row in links]),
        )

    def overhead_bytes(self, number: int) -> int:
        """What a stage on a place takes besides layers."""
        return self.footprint_of(number).workspace_bytes(self.workload.max_context_tokens)

    def helper_overhead_bytes(self, home: int) -> int:
        """What helping a stage takes besides experts: no keys and values are gathered."""
        return self.footprint_of(home).workspace_bytes(0)

    def footprint_of(self, number: int) -> Footprint:
        """What the model weighs at the dtype of a place."""
        return self.weights[self.dtypes[number]]

    def host(self, number: int) -> str:
        """The node of a place."""
        return self.places[number].node.host

    def sharing_key(self, home: int, members: int) -> tuple[object, ...]:
        """What the seconds of a stage's experts depend on besides how they are spread."""
        return (self.dtypes[home], *self.seats(home, members))

    def seats(self, home: int, members: int) -> list[Seat]:
        """The hosts of a stage's experts, the home first, as its experts see them."""
        return [self.seat(home, site) for site in sites_of(home, members)]

    def _seat(self, home: int, site: int) -> Seat:
        link = None if site == home else self.link(home, site)
        return Seat(speed=self.speed(site, self.dtypes[home]), link=link)

    def mixes(self, tokens: int) -> tuple[Mix, ...]:
        """Of steps with prompts and without, for so many decoded sequences a step: the ways that
        there are; one stream alone has no prompts beside it."""
        if self.workload.objective != "throughput":
            return (((1.0, tokens),),)
        chosen = sizes(tokens) if self._size is None else (self._size,)
        return tuple(mix(tokens, size) for size in chosen)

    @property
    def context_tokens(self) -> int:
        """How many of a sequence are in use when it is timed: half of what there may be."""
        return max(1, self.workload.max_context_tokens // 2)

    @property
    def prompt_context_tokens(self) -> float:
        """Keys that a token of the prompts sees on average. With P tokens of prompts for each that
        is generated an answer of A tokens sees (P + 1/2) A of them, and its prompt P/2 A."""
        return self.context_tokens * PROMPT_TOKENS / (2 * PROMPT_TOKENS + 1)

    def seconds_L(self, number: int, tokens: int) -> Matrix:
        """Of the layers before each on a place."""
        key = (self._place_key(number), tokens, self._size, self.workload.objective)
        if key not in self.known:
            self.known[key] = prefix_sums(self._mean_layers_s(number, tokens, layer_s))
        found: Matrix = self.known[key]
        return found

    def _place_key(self, number: int) -> tuple[object, ...]:
        """What seconds of layers depend on besides the steps."""
        return self.dtypes[number], self.speed(number), self.context_tokens

    def _attention_L(self, home: int, tokens: int) -> list[float]:
        """Seconds of each layer besides its experts, with the prompts that come along."""
        return self._mean_layers_s(home, tokens, attention_s)

    def _mean_layers_s(self, number: int, decoded: int, seconds: LayerSeconds) -> list[float]:
        mixes, cost = self.mixes(decoded), self.cost(number)
        step_s = partial(self._layer_step_s, number, decoded, seconds)
        return cost.of_layers(lambda layer: mean(mixes, partial(step_s, layer)))

    def _layer_step_s(
        self, number: int, decoded: int, seconds: LayerSeconds, layer: int, tokens: int
    ) -> float:
        return seconds(
            self.cost(number),
            layer,
            self.speed(number),
            tokens=decoded,
            context_tokens=self.context_tokens,
            prompt_tokens=max(0, tokens - decoded),
            prompt_context_tokens=self.prompt_context_tokens,
        )

    def layers_s(self, number: int, decoded: int, tokens: int, seconds: LayerSeconds) -> Matrix:
        """Of the layers before each on a place, in a step of so many tokens."""
        key = (self._place_key(number), decoded, tokens, seconds)
        if key not in self.known:
            step_s = partial(self._layer_step_s, number, decoded, seconds)
            each = self.cost(number).of_layers(lambda layer: step_s(layer, tokens))
            self.known[key] = prefix_sums(each)
        found: Matrix = self.known[key]
        return found

    def prefill_s(
        self,
        sites: Sequence[int],
        ends: Sequence[int],
        tokens: int,
        *,
        step_tokens: int = STEP_TOKENS,
        chunk_s: Callable[[int, int, int], float] | None = None,
    ) -> float:
        """A prompt alone to its first token: in chunks of so many tokens, as many at a time as the
        engine has steps under way.

        `chunk_s` says how long a stage, by its number, takes for a chunk from a position on of so
        many tokens; without it each holds all of its experts itself.
        """
        spans = list(zip(sites, (0, *ends[:-1]), ends, strict=True))
        chunks = [(at, min(step_tokens, tokens - at)) for at in range(0, tokens, step_tokens)]
        at_once = len(set(sites)) + 1
        free_s = dict.fromkeys(sites, 0.0)
        done_s: list[float] = []
        for number, (position, count) in enumerate(chunks):
            now_s = done_s[number - at_once] if number >= at_once else 0.0
            for at, (site, start, end) in enumerate(spans):
                if at:
                    link = self.link(sites[at - 1], site)
                    now_s += hop_s(count * self.cost(site).hidden_bytes, link)
                now_s = max(now_s, free_s[site])
                if chunk_s is None:
                    now_s += self._chunk_s(site, start, end, position, count)
                else:
                    now_s += chunk_s(at, position, count)
                free_s[site] = now_s
            done_s.append(now_s)
        last, speed = self.cost(sites[-1]), self.speed(sites[-1])
        back_s = hop_s(TOKEN_ID_BYTES, self.link(sites[-1], sites[0]))
        return done_s[-1] + output_s(last, speed, tokens=1) + back_s

    def _chunk_s(self, site: int, start: int, end: int, position: int, count: int) -> float:
        """One stage's time of a chunk of a prompt."""
        cost, speed = self.cost(site), self.speed(site)
        context = chunk_context(position, count)
        layers = cost.of_layers(
            lambda layer: prefill_layer_s(cost, layer, speed, tokens=count, context_tokens=context)
        )
        return self.places[site].device.step_overhead_s + sum(layers[start:end])

    def unmeasured(self, sites: Sequence[int], members: Sequence[int]) -> list[str]:
        """Links that nobody measured between stages, back to the first one, and to helpers."""
        pairs = [*pairwise(sites), (sites[-1], sites[0])]
        for home, mask in zip(sites, members, strict=True):
            pairs += [(home, helper) for helper in helpers_of(home, mask)]
        found: dict[frozenset[str], str] = {}
        for source, target in pairs:
            a, b = self.host(source), self.host(target)
            if a != b and (a, b) not in self._links:
                found.setdefault(frozenset((a, b)), f"{a} to {b}")
        return list(found.values())


def prefix_sums(values: Sequence[float]) -> Matrix:
    """[L + 1], from 0 on."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
