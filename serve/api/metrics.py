"""``GET /metrics``: counters, gauges and latencies in Prometheus' text format.

The names are vLLM's with the prefix ``magnetar:`` instead of ``vllm:``, and mean the same, so that
its dashboards need one replacement. Everything is counted in the event loop of the API, by one
clock; the engine's thread only keeps the numbers of `Engine.stats`.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, Self

from ...errors import QueueFullError, UsageError
from ..engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FinishedReason = Literal["stop", "length", "abort", "error"]

_Sample = tuple[str, dict[str, str], float]
"""Suffix of the name, labels, and value of one line."""
_REASONS: tuple[FinishedReason, ...] = ("stop", "length", "abort", "error")
# vLLM's bounds, in seconds.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_END_TO_END_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Histogram:
    """How many readings were at most each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend; what is above the last is counted too."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, reading: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, reading)] += 1
        self._sum += reading

    def samples(self) -> Iterator[_Sample]:
        """The lines of the page."""
        total = 0
        for bound, count in zip((*self._bounds, None), self._counts, strict=True):
            total += count
            yield "_bucket", {"le": "+Inf" if bound is None else f"{bound:g}"}, total
        yield "_sum", {}, self._sum
        yield "_count", {}, total


class RequestMeter:
    """Follows one request, as a context that ends with it. `Metrics.request` makes it."""

    def __init__(self, metrics: "Metrics", num_prompt_tokens: int) -> None:
        self.finished_reason: FinishedReason = "abort"
        """To be set before the last token is handed on; left as it is where there is none."""
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._began_at = self._last_at = metrics.clock()
        self._num_tokens = 0

    def token(self) -> None:
        """One more token of the answer is here."""
        metrics, now = self._metrics, self._metrics.clock()
        if self._num_tokens == 0:
            metrics.num_prompt_tokens += self._num_prompt_tokens
            metrics.first_token_s.observe(now - self._began_at)
        else:
            metrics.inter_token_s.observe(now - self._last_at)
        metrics.num_generation_tokens += 1
        self._num_tokens += 1
        self._last_at = now

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, QueueFullError | UsageError):
            return  # it was refused
        if isinstance(error, Exception):
            self.finished_reason = "error"
        self._metrics.num_finished[self.finished_reason] += 1
        if self.finished_reason in ("stop", "length"):
            # Whoever reads the answer may take its time with the last token.
            self._metrics.end_to_end_s.observe(self._last_at - self._began_at)


class Metrics:
    """What the API has seen since it started. For one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.num_prompt_tokens = 0
        """Of the requests whose first token came."""
        self.num_generation_tokens = 0
        self.num_finished: Counter[FinishedReason] = Counter()
        self.first_token_s = Histogram(_FIRST_TOKEN_S)
        self.inter_token_s = Histogram(_INTER_TOKEN_S)
        self.end_to_end_s = Histogram(_END_TO_END_S)

    def request(self, num_prompt_tokens: int) -> RequestMeter:
        """Follow a request that is handed to the engine now."""
        return RequestMeter(self, num_prompt_tokens)

    def render(self, stats: EngineStats, *, model_name: str) -> str:
        """The whole page."""
        used = _share_in_use(stats)
        lines: list[str] = []

        def add(name: str, kind: str, text: str, samples: Iterable[_Sample]) -> None:
            lines.append(f"# HELP magnetar:{name} {text}")
            lines.append(f"# TYPE magnetar:{name} {kind}")
            for suffix, labels, value in samples:
                labels = {"model_name": model_name, **labels}
                joined = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
                lines.append(f"magnetar:{name}{suffix}{{{joined}}} {value:.17g}")

        def add_one(name: str, kind: str, text: str, value: float) -> None:
            add(name, kind, text, [("", {}, value)])

        add_one("num_requests_running", "gauge", "Requests that hold KV blocks.", stats.running)
        add_one("num_requests_waiting", "gauge", "Requests that wait for them.", stats.waiting)
        add_one("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use; 1 is all.", used)
        for name, text, value in (
            (
                "prefix_cache_queries",
                "Prompt tokens looked for in the KV cache.",
                stats.num_cache_queries,
            ),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.num_cache_hits),
            ("num_preemptions", "Requests that had to give up KV blocks.", stats.num_preemptions),
            ("prompt_tokens", "Tokens of prompts.", self.num_prompt_tokens),
            ("generation_tokens", "Tokens of answers.", self.num_generation_tokens),
        ):
            add_one(f"{name}_total", "counter", text, value)
        for name, kind, text, samples in _pipeline_families(stats):
            add(name, kind, text, samples)
        reasons: list[_Sample] = [
            ("", {"finished_reason": reason}, self.num_finished[reason]) for reason in _REASONS
        ]
        add("request_success_total", "counter", "Requests that ended, by how.", reasons)
        if stats.expert_tokens:
            add(
                "expert_tokens_total",
                "counter",
                "Tokens that each expert was chosen for.",
                _expert_samples(stats.expert_tokens),
            )
        for name, text, histogram in (
            ("time_to_first_token", "From the request to its first token.", self.first_token_s),
            ("inter_token_latency", "Between two tokens of an answer.", self.inter_token_s),
            ("e2e_request_latency", "From the request to its last token.", self.end_to_end_s),
        ):
            add(f"{name}_seconds", "histogram", text, histogram.samples())
        return "\n".join(lines) + "\n"


def _share_in_use(stats: EngineStats) -> float:
    return 1 - stats.kv_blocks_free / stats.num_kv_blocks


def _pipeline_families(stats: EngineStats) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    """Of each pipeline; under names of their own, so that sums count nothing twice."""
    if not stats.pipelines:
        return
    readings: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
        ("up", "Whether the pipeline serves.", lambda each: not each.is_over),
        ("requests_running", "Requests that hold KV blocks there.", lambda each: each.running),
        ("requests_waiting", "Requests that wait for them.", lambda each: each.waiting),
        ("kv_cache_usage_perc", "Share of its KV blocks in use.", _share_in_use),
    )
    for name, text, read in readings:
        samples: list[_Sample] = [
            ("", {"pipeline": str(index)}, read(each)) for index, each in enumerate(stats.pipelines)
        ]
        yield f"pipeline_{name}", "gauge", text, samples
    text = "How often the pipeline was lost and came back."
    restarts: list[_Sample] = [
        ("", {"pipeline": str(index)}, each.num_restarts)
        for index, each in enumerate(stats.pipelines)
    ]
    yield "pipeline_restarts_total", "counter", text, restarts
    text = "Requests that went on elsewhere, or later, when their pipeline was lost."
    yield "requests_moved_total", "counter", text, [("", {}, stats.num_moved)]


def _expert_samples(expert_tokens: Mapping[int, Sequence[int]]) -> Iterator[_Sample]:
    for layer, counts in sorted(expert_tokens.items()):
        for expert, count in enumerate(counts):
            yield "", {"layer": str(layer), "expert": str(expert)}, count


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
