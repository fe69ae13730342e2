"""A closed loop of requests over servers with layers, event by event: what a layout really yields.

Requests are always there; one is admitted as soon as every server of its path has room for its
keys and values. Two policies of batching:

* `Waiting`: every server takes what waits, prompts whole or in chunks, decodes up to a cap; so do
  servers that know nothing of each other.
* `Steps`: one scheduler cuts the running requests into micro-batches that travel as they are,
  each with a budget for chunks of prompts; so does the engine of this product.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Server:
    """Some layers on some machine."""

    step_s: Callable[[int, int], float]
    """Of a batch of so many decodes and so many tokens of prompts."""
    kv_tokens: float
    most_decodes: int = 10**9
    most_prompts: int = 10**9
    """Whole prompts in one batch."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Every server batches what waits for it."""

    chunk_tokens: int | None = None
    """None: prompts are whole."""
    most_decodes: int = 10**9


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A scheduler in front of one chain of servers."""

    micro_batches: int
    step_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked: mean lengths are those of the lists."""

    prompts: Sequence[int]
    outputs: Sequence[int]
    streams: int = 10**9
    kv_share: float = 1.0
    """Of the room for keys and values that admission fills."""

    def lengths(self, seed: int) -> Iterator[tuple[int, int]]:
        """Prompt and output of one request after another."""
        draw = random.Random(seed)
        while True:
            number = draw.randrange(len(self.prompts))
            yield self.prompts[number], self.outputs[number]


@dataclass(slots=True)
class _Request:
    path: int
    prompt: int
    output: int
    made: int = 0
    ready: int = 0
    """Tokens of the prompt that are computed."""


@dataclass(slots=True)
class _Queue:
    decodes: deque[_Request] = field(default_factory=deque)
    chunks: deque[tuple[_Request, int]] = field(default_factory=deque)
    is_busy: bool = False


Hop = Callable[[int, int, int], float]
"""Seconds from a server to another (-1: the scheduler) for so many tokens."""


def waiting_tokens_per_s(
    servers: Sequence[Server],
    paths: Sequence[tuple[float, Sequence[int]]],
    hop_s: Hop,
    load: Load,
    policy: Waiting,
    *,
    warm_s: float,
    measured_s: float,
    seed: int = 0,
) -> float:
    """Decoded tokens per second over paths of servers, each with its weight."""
    queues = [_Queue() for _ in servers]
    room = [load.kv_share * server.kv_tokens for server in servers]
    mean = sum(load.prompts) / len(load.prompts) + sum(load.outputs) / len(load.outputs)
    taken = [0.0] * len(paths)
    events: list[tuple[float, int, int, list[tuple[_Request, int]]]] = []
    after = [{a: b for a, b in zip([-1, *path], [*path, -1], strict=True)} for _, path in paths]
    lengths, number, now, running, made = load.lengths(seed), 0, 0.0, 0, 0

    def send(source: int, items: list[tuple[_Request, int]]) -> None:
        nonlocal number
        by_target: dict[int, list[tuple[_Request, int]]] = {}
        for item in items:
            by_target.setdefault(after[item[0].path][source], []).append(item)
        for target, group in by_target.items():
            number += 1
            tokens = sum(max(1, chunk) for _, chunk in group)
            heapq.heappush(events, (now + hop_s(source, target, tokens), number, target, group))

    def admit() -> None:
        nonlocal running
        while running < load.streams:
            fits = [p for p, (_, path) in enumerate(paths) if all(room[s] >= mean for s in path)]
            if not fits:
                return
            chosen = min(fits, key=lambda p: (taken[p] + 1) / paths[p][0])
            taken[chosen] += 1
            running += 1
            for server in paths[chosen][1]:
                room[server] -= mean
            prompt, output = next(lengths)
            size = policy.chunk_tokens or prompt
            request = _Request(chosen, prompt, output)
            send(-1, [(request, min(size, prompt - at)) for at in range(0, prompt, size)])

    def start(at: int) -> None:
        nonlocal number
        queue, server = queues[at], servers[at]
        cap = min(policy.most_decodes, server.most_decodes)
        decodes = [queue.decodes.popleft() for _ in range(min(cap, len(queue.decodes)))]
        count = min(1 if policy.chunk_tokens else server.most_prompts, len(queue.chunks))
        chunks = [queue.chunks.popleft() for _ in range(count)]
        if not decodes and not chunks:
            queue.is_busy = False
            return
        queue.is_busy = True
        seconds = server.step_s(len(decodes), sum(size for _, size in chunks))
        number += 1
        done = [*((request, 0) for request in decodes), *chunks]
        heapq.heappush(events, (now + seconds, number, -2 - at, done))

    admit()
    while events:
        now, _, target, items = heapq.heappop(events)
        if now > warm_s + measured_s:
            break
        if target <= -2:
            send(-2 - target, items)
            start(-2 - target)
        elif target >= 0:
            for request, size in items:
                if size:
                    queues[target].chunks.append((request, size))
                else:
                    queues[target].decodes.append(request)
            if not queues[target].is_busy:
                start(target)
        else:
            again = []
            for request, size in items:
                request.ready += size
                if request.ready < request.prompt:
                    continue
                request.made += 1
                made += now > warm_s
                if request.made < request.output:
                    again.append((request, 0))
                    continue
                running -= 1
                for at in paths[request.path][1]:
                    room[at] += mean
            send(-1, again)
            admit()
    return made / measured_s


def steps_tokens_per_s(
    servers: Sequence[Server],
    hops_s: Callable[[int, int], float],
    load: Load,
    policy: Steps,
    *,
    num_steps: int,
    seed: int = 0,
) -> float:
    """Decoded tokens per second of a chain under one scheduler.

    ``hops_s(at, tokens)`` are the seconds from server `at` to the next one, or back to the
    scheduler. The first half of the steps warms up.
    """
    mean = sum(load.prompts) / len(load.prompts) + sum(load.outputs) / len(load.outputs)
    fits = load.kv_share * min(server.kv_tokens for server in servers) / mean
    streams, lengths = int(min(load.streams, fits)), load.lengths(seed)
    if streams < 1:
        return 0.0
    ready: deque[_Request] = deque()
    prompts: deque[_Request] = deque()
    for _ in range(streams):
        prompts.append(_Request(0, *next(lengths)))
    free_at = [0.0] * len(servers)
    flights: deque[tuple[float, list[_Request]]] = deque()
    now = began = 0.0
    num_decoding = made = 0
    for number in range(num_steps):
        if number == num_steps // 2:
            began, made = now, 0
        decodes: list[_Request] = []
        samples = sum(bool(sampled) for _, sampled in flights)
        while samples >= policy.micro_batches or not (ready or prompts):
            back, sampled = flights.popleft()
            now = max(now, back)
            samples -= bool(sampled)
            for request in sampled:
                request.made += 1
                made += 1
                if request.made < request.output:
                    ready.append(request)
                else:
                    num_decoding -= 1
                    prompts.append(_Request(0, *next(lengths)))
        share = -(-num_decoding // policy.micro_batches) if num_decoding else 0
        while ready and len(decodes) < share:
            decodes.append(ready.popleft())
        budget, sampled, size = policy.step_tokens - len(decodes), list(decodes), 0
        while prompts and size < budget:
            request = prompts[0]
            part = min(budget - size, request.prompt - request.ready)
            request.ready += part
            size += part
            if request.ready == request.prompt:
                prompts.popleft()
                sampled.append(request)
                num_decoding += 1
        arrives = now
        tokens = len(decodes) + size
        for at, server in enumerate(servers):
            starts = max(arrives, free_at[at])
            free_at[at] = starts + server.step_s(len(decodes), size)
            last = at == len(servers) - 1
            arrives = free_at[at] + hops_s(at, len(sampled) if last else tokens)
        # One step more than there are servers is on its way at most.
        flights.append((arrives, sampled))
        if len(flights) > len(servers) + 1:
            now = max(now, flights[0][0])
        now = max(now, free_at[0] - servers[0].step_s(len(decodes), size))
    return made / (now - began) if now > began else 0.0
