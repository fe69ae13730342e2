"""A stage is killed while streams run: of one of two pipelines, and of the only one."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from magnetar.fetcher.checkpoint.release import FolderReader, read_release
from magnetar.fetcher.checkpoint.source import FileTensorSource
from magnetar.fetcher.config import ReleaseHints
from magnetar.serve.engine.step import SamplingParams
from magnetar.tests.command import Command, magnetar
from magnetar.tests.ray_cluster import cluster_of_commands
from magnetar.tests.releases import write_release
from magnetar.tests.stages import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_TOKENS = 160
NUM_STREAMS = 8
NUM_COMPUTED = 2
"""Of the streams, those whose answers are computed here too."""
WAIT_S = 30.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with cluster_of_commands(tmp_path_factory.mktemp("home"), h1=700, h2=700) as address:
        yield address


def prompt(number: int) -> list[int]:
    return [1, *range(10 * number + 5, 10 * number + 25)]


@dataclass
class Reader:
    """One client's streamed answer while it comes."""

    number: int
    token_ids: list[int] = field(default_factory=list)
    well_begun: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)

    def read(self, client: httpx.Client) -> list[int]:
        body = {
            "model": "tiny",
            "prompt": prompt(self.number),
            "max_tokens": NUM_TOKENS,
            "seed": self.number,
            "temperature": 1.0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    for choice in event["choices"]:
                        self.token_ids += choice["token_ids"] or []
                if len(self.token_ids) >= 8:
                    self.well_begun.set()
                    assert self.goes_on.wait(WAIT_S)
        return self.token_ids


def expected(release: Path) -> list[list[int]]:
    """What one stage says in this process, one request after the other."""
    facts = read_release(FolderReader(release), given=ReleaseHints(), known=ReleaseHints())
    source = FileTensorSource(release, facts.index)
    pipeline = Pipeline(facts.config, source, num_kv_blocks=256, batch_invariant=True)
    return [
        pipeline.generate(number, prompt(number), NUM_TOKENS, SamplingParams(seed=number))
        for number in range(NUM_COMPUTED)
    ]


def metrics(client: httpx.Client) -> dict[str, float]:
    """The readings that tell of pipelines."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(("magnetar:pipeline", "magnetar:requests_moved")):
            name, _, value = line.replace('model_name="tiny",', "").rpartition(" ")
            found[name.removeprefix("magnetar:").partition('{model_name="tiny"}')[0]] = float(value)
    return found


def read_all(client: httpx.Client, pool: ThreadPoolExecutor) -> list[tuple[Reader, Future[Any]]]:
    readers = [Reader(number) for number in range(NUM_STREAMS)]
    return [(reader, pool.submit(reader.read, client)) for reader in readers]


def stage_processes() -> list[psutil.Process]:
    ours = psutil.Process().children(recursive=True)
    return [each for each in ours if "ray::StageActor" in "".join(each.cmdline())]


def hide(release: Path) -> None:
    """No pipeline comes back until `show`: so long a test may look around."""
    for path in release.glob("*.safetensors"):
        path.rename(path.with_suffix(".hidden"))


def show(release: Path) -> None:
    for path in release.glob("*.hidden"):
        path.rename(path.with_suffix(".safetensors"))


@contextmanager
def serving(release: Path, address: str, layout: str) -> Iterator[tuple[Command, httpx.Client]]:
    """The command that serves a release in pipelines or stages as `layout` says, and a client."""
    with magnetar(
        *("up", str(release), f"--ray-address={address}", f"--store={release.parent}/{{host}}"),
        *(layout, "--batch-invariant", "--name=tiny", "--port=0", "--max-concurrency=16"),
    ) as up:
        url = up.until("ready")["url"]
        with httpx.Client(base_url=url, timeout=WAIT_S, trust_env=False) as client:
            yield up, client


def test_streams_go_on_in_the_other_pipeline_when_one_dies(address: str, tmp_path: Path) -> None:
    release = tmp_path / "tiny"
    write_release(release, layout="huggingface")
    right = expected(release)
    with (
        ThreadPoolExecutor(NUM_STREAMS) as pool,
        serving(release, address, "--pipelines=2") as (up, client),
    ):
        stages = stage_processes()
        assert len(stages) == 2
        reading = read_all(client, pool)
        for reader, _ in reading:
            assert reader.well_begun.wait(WAIT_S)
        told = metrics(client)
        assert [told[f'pipeline_up{{pipeline="{n}"}}'] for n in (0, 1)] == [1, 1]
        running = [told[f'pipeline_requests_running{{pipeline="{n}"}}'] for n in (0, 1)]
        assert sum(running) == NUM_STREAMS
        assert min(running) >= NUM_STREAMS / 2 - 1

        stages[0].kill()
        for reader, _ in reading:
            reader.goes_on.set()
        answers = [answer.result(WAIT_S) for _, answer in reading]
        assert answers[:NUM_COMPUTED] == right

        assert "stage 0 of pipeline" in up.until("note")["message"]
        assert client.get("/readyz").status_code == 200
        assert len(stage_processes()) == 2
        told = metrics(client)
        assert [told[f'pipeline_up{{pipeline="{n}"}}'] for n in (0, 1)] == [1, 1]
        restarts = [told[f'pipeline_restarts_total{{pipeline="{n}"}}'] for n in (0, 1)]
        assert sorted(restarts) == [0, 1]
        assert told["requests_moved_total"] >= NUM_STREAMS / 2 - 1

        # Without the one that lived, all goes to the one that came back.
        stages[1].kill()
        reading = read_all(client, pool)
        for reader, _ in reading:
            reader.goes_on.set()
        assert [answer.result(WAIT_S) for _, answer in reading] == answers


def test_streams_of_the_only_pipeline_wait_until_it_is_back(address: str, tmp_path: Path) -> None:
    release = tmp_path / "tiny"
    write_release(release, layout="huggingface")
    right = expected(release)
    with (
        ThreadPoolExecutor(NUM_STREAMS) as pool,
        serving(release, address, "--stages=2") as (up, client),
    ):
        assert client.get("/readyz").status_code == 200
        stages = stage_processes()
        assert len(stages) == 2
        reading = read_all(client, pool)
        for reader, _ in reading:
            assert reader.well_begun.wait(WAIT_S)

        hide(release)
        stages[0].kill()
        for reader, _ in reading:
            reader.goes_on.set()
        warned = up.until("warning")["message"]
        assert "died" in warned
        assert warned.endswith("; it is being started again")
        refused = client.post("/v1/completions", json={"model": "tiny", "prompt": [1]})
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/readyz").status_code == 503
        (found,) = status()
        assert not found["ready"]
        amiss = {each["type"]: each["status"] for each in found["conditions"]}
        assert not amiss["AllPipelinesUp"]
        assert found["pipelines"][0]["num_failures"] >= 1
        assert not any(answer.done() for _, answer in reading)

        show(release)
        answers = [answer.result(WAIT_S) for _, answer in reading]
        assert answers[:NUM_COMPUTED] == right
        assert "(started again once so far)" in up.until("note")["message"]
        assert client.get("/readyz").status_code == 200
        told = metrics(client)
        assert told['pipeline_restarts_total{pipeline="0"}'] == 1
        assert told["requests_moved_total"] == NUM_STREAMS
        (found,) = status()
        assert found["ready"]
        assert found["pipelines"][0]["num_restarts"] == 1


def status() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "magnetar.cli", "status", "--output=json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found
