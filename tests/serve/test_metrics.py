"""What the API counts, and the page that Prometheus reads."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest

from magnetar.errors import QueueFullError, StageLostError
from magnetar.serve.api.metrics import Histogram, Metrics
from magnetar.serve.engine.stats import EngineStats, total
from magnetar.tests.api_server import saying, serving
from magnetar.tests.fake_engine import FakeEngine

STATS = EngineStats(
    running=3,
    waiting=2,
    num_kv_blocks=10,
    kv_blocks_free=4,
    num_preemptions=1,
    num_cache_queries=100,
    num_cache_hits=48,
)
SAMPLE = re.compile(r'magnetar:\w+\{(\w+="[^"\\]*",?)+\} [-+.e\d]+')


def values(page: str) -> dict[str, float]:
    """The samples by name and labels, without the model's."""
    found = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            assert SAMPLE.fullmatch(line), line
            name, _, value = line.rpartition(" ")
            name = re.sub(r'model_name="[^"]*",?', "", name).removeprefix("magnetar:")
            found[name.removesuffix("{}")] = float(value)
    return found


def ticking(*readings: float) -> Metrics:
    clock: Iterator[float] = iter(readings)
    return Metrics(clock=lambda: next(clock))


def test_a_histogram_counts_what_is_at_most_each_bound() -> None:
    histogram = Histogram((0.5, 1.0))
    for reading in (0.25, 0.5, 0.75, 9.0):
        histogram.observe(reading)
    assert [(suffix, labels.get("le"), value) for suffix, labels, value in histogram.samples()] == [
        ("_bucket", "0.5", 2),
        ("_bucket", "1", 3),
        ("_bucket", "+Inf", 4),
        ("_sum", None, 10.5),
        ("_count", None, 4),
    ]


def test_several_pipelines_are_summed_and_told_one_by_one() -> None:
    assert not [
        name for name in values(Metrics().render(STATS, model_name="tiny")) if "pipe" in name
    ]
    other = replace(STATS, running=1, waiting=0, kv_blocks_free=9)
    lost = EngineStats(num_kv_blocks=50, kv_blocks_free=50, num_preemptions=5, is_over=True)
    stats = total([STATS, other, lost], num_moved=4)
    found = values(Metrics().render(stats, model_name="tiny"))
    assert found["num_requests_running"] == 4
    assert found["num_requests_waiting"] == 2
    assert found["kv_cache_usage_perc"] == pytest.approx(0.35)  # of those that serve
    assert found["num_preemptions_total"] == 7
    assert found["requests_moved_total"] == 4
    by_pipeline = [
        [found[f'pipeline_{name}{{pipeline="{index}"}}'] for index in range(3)]
        for name in ("up", "requests_running", "requests_waiting", "kv_cache_usage_perc")
    ]
    assert by_pipeline == [[1, 1, 0], [3, 1, 0], [2, 0, 0], pytest.approx([0.6, 0.1, 0.0])]


def test_tokens_of_every_expert_are_told_by_layer() -> None:
    found = values(Metrics().render(STATS, model_name="tiny"))
    assert not [name for name in found if name.startswith("expert")]
    stats = replace(STATS, expert_tokens={3: (10, 0), 2: (4, 6)})
    found = values(Metrics().render(stats, model_name="tiny"))
    assert {name: value for name, value in found.items() if name.startswith("expert")} == {
        'expert_tokens_total{layer="2",expert="0"}': 4,
        'expert_tokens_total{layer="2",expert="1"}': 6,
        'expert_tokens_total{layer="3",expert="0"}': 10,
        'expert_tokens_total{layer="3",expert="1"}': 0,
    }


def test_the_state_of_the_engine_is_told_in_the_names_of_vllm() -> None:
    found = values(Metrics().render(STATS, model_name="tiny"))
    assert found["num_requests_running"] == 3
    assert found["num_requests_waiting"] == 2
    assert found["kv_cache_usage_perc"] == pytest.approx(0.6)
    assert found["prefix_cache_queries_total"] == 100
    assert found["prefix_cache_hits_total"] == 48
    assert found["num_preemptions_total"] == 1


def test_a_request_is_timed_from_its_start_to_its_last_token() -> None:
    metrics = ticking(10.0, 10.03, 10.1, 10.2)
    with metrics.request(7) as meter:
        for _ in range(3):
            meter.token()
        meter.finished_reason = "length"
    found = values(metrics.render(STATS, model_name="tiny"))
    assert (found["prompt_tokens_total"], found["generation_tokens_total"]) == (7, 3)
    assert found['request_success_total{finished_reason="length"}'] == 1
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(0.03)
    assert found['time_to_first_token_seconds_bucket{le="0.02"}'] == 0
    assert found['time_to_first_token_seconds_bucket{le="0.04"}'] == 1
    assert found["inter_token_latency_seconds_count"] == 2
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(StageLostError("gone"), "error"), (GeneratorExit(), "abort"), (QueueFullError("full"), None)],
)
def test_requests_that_do_not_end_well_are_told_apart(
    error: BaseException, reason: str | None
) -> None:
    metrics = Metrics()
    with suppress(BaseException), metrics.request(7):
        raise error
    assert dict(metrics.num_finished) == ({} if reason is None else {reason: 1})
    assert values(metrics.render(STATS, model_name="x"))["e2e_request_latency_seconds_count"] == 0


def test_names_of_models_cannot_break_the_page() -> None:
    page = Metrics().render(STATS, model_name='a"b\\c\nd')
    assert r'{model_name="a\"b\\c\nd"} 3' in page


def test_every_metric_says_what_it_is_once() -> None:
    page = Metrics().render(STATS, model_name="tiny")
    names = re.findall(r"^# TYPE (\S+) (?:gauge|counter|histogram)$", page, re.MULTILINE)
    assert len(names) == len(set(names)) == page.count("# HELP ")
    assert all(name.startswith("magnetar:") for name in names)


def scrape(client: httpx.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return values(response.text)


def test_answers_are_counted_and_a_stop_string_is_no_abort() -> None:
    with serving(saying(" one two three")) as service:
        body = {"prompt": "Say", "max_tokens": 50}
        plain = service.post("completions", body).json()["usage"]
        stopped = service.post("completions", {**body, "stop": "two"}).json()["usage"]
        found = scrape(service.http)
    assert found['request_success_total{finished_reason="stop"}'] == 2
    assert found['request_success_total{finished_reason="abort"}'] == 0
    for name in ("prompt", "generation"):
        usage = f"{name.replace('generation', 'completion')}_tokens"
        assert found[f"{name}_tokens_total"] == plain[usage] + stopped[usage]
    assert found["time_to_first_token_seconds_count"] == 2


def test_a_refused_request_is_not_counted() -> None:
    with serving(FakeEngine(reply=lambda prompt, params: [], queue_is_full=True)) as service:
        assert service.post("completions", {"prompt": "Say"}).status_code == 429
        found = scrape(service.http)
    assert sum(value for name, value in found.items() if "request_success" in name) == 0


def test_the_page_wants_the_key_where_there_is_one() -> None:
    with serving(saying(" x"), api_key="secret") as service:
        assert service.http.get("/metrics").status_code == 200
        assert httpx.get(f"{service.server.url}/metrics", trust_env=False).status_code == 401
