"""Four nodes with different memories; commands know each other through the cluster alone."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import OpenAI

from magnetar.tests.command import magnetar
from magnetar.tests.ray_cluster import cluster_of_commands
from magnetar.tests.releases import write_release
from magnetar.tests.seeder import seeding

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# With 256 MB for a process and 60 MB of keys and values a layer: no layer, 1, 3, and 1 of four.
MEMORIES = {"h1": 330, "h2": 400, "h3": 540, "h4": 380}
CONCURRENCY = 450
SOON = ("--timeout=20",)
LATER = """
apiVersion: magnetar/v1
kind: Deployment
metadata: {{name: later}}
spec:
  source: {{magnet: "{magnet}"}}
  placement:
    rayAddress: {address}
    store: "{store}/later-{{host}}"
    nodes: [{{node: h2, exclude: true}}, {{node: h3, exclude: true}}]
  serve: {{port: 0, maxConcurrency: 4}}
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster that all commands of this file join; they share its token."""
    with cluster_of_commands(tmp_path_factory.mktemp("home"), **MEMORIES) as address:
        yield address


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command from its start to its end."""
    return subprocess.run(
        [sys.executable, "-m", "magnetar.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env=dict(os.environ),
    )


def status(*arguments: str) -> list[dict[str, Any]]:
    done = run("status", *arguments, "--output=json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_up_status_and_down_are_separate_commands(address: str, tmp_path: Path) -> None:
    release = tmp_path / "tiny-moe"
    write_release(release, layout="huggingface-sharded")
    with seeding(release) as seed:
        up = run(
            "up",
            seed.magnet,
            f"--peer={seed.address}",
            f"--ray-address={address}",
            f"--store={tmp_path}/store-{{host}}",
            f"--max-concurrency={CONCURRENCY}",
            "--name=tiny",
            "--port=0",
            "--detach",
        )
    assert up.returncode == 0, up.stderr

    (found,) = status()
    assert found["ready"], found
    stages = found["plan"]["pipelines"][0]["stages"]
    assert [stage["host"] for stage in stages] == ["h3", "h2"]
    assert [stage["end_layer"] - stage["first_layer"] for stage in stages] == [3, 1]
    reasons = {idle["host"]: idle["reason"] for idle in found["plan"]["unused"]}
    assert "too small" in reasons["h1"]
    assert "not needed" in reasons["h4"]
    # Only the nodes of the plan hold the weights; the home node read just what describes them.
    assert {stage["host"] for stage in stages} == {
        host for host in MEMORIES if holds_weights(tmp_path / f"store-{host}")
    }

    client = OpenAI(base_url=f"{found['url']}/v1", api_key="none", max_retries=0, timeout=60)
    reply = client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=8)
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0

    # The seeder is gone: whoever comes now has nobody but the nodes that hold it.
    alone = run(
        "fetch", seed.magnet, f"--ray-address={address}", f"--store={tmp_path}/alone", *SOON
    )
    assert alone.returncode == 0, alone.stderr
    for file in release.iterdir():
        assert (Path(alone.stdout.strip()) / file.name).read_bytes() == file.read_bytes()
    later = tmp_path / "later.yaml"
    later.write_text(LATER.format(magnet=seed.magnet, address=address, store=tmp_path))
    up = run("up", "-f", str(later), "--detach", *SOON)
    assert up.returncode == 0, up.stderr
    (second,) = (each for each in status() if each["name"] == "later")
    (share,) = (each for each in second["fetched"] if each["wanted_bytes"] > 100_000)
    assert share["received_bytes"] >= share["wanted_bytes"]
    nodes = {node["host"]: node for node in second["traffic"]}
    assert sum(node["wan_received_bytes"] for node in nodes.values()) == 0
    assert nodes[share["host"]]["lan_received_bytes"] >= share["wanted_bytes"]
    assert run("down", "later").returncode == 0

    again = run("up", str(release), f"--ray-address={address}", "--name=tiny", "--port=0")
    assert again.returncode == 2
    assert "magnetar down tiny" in again.stderr

    wishes = (f"--max-concurrency={CONCURRENCY}", f"--store={tmp_path}/store-{{host}}")
    plan = ("plan", seed.magnet, f"--ray-address={address}", "--timeout=20", "--diff=tiny", *wishes)
    same = run(*plan)
    assert same.stdout.startswith("no changes"), same.stdout + same.stderr
    moves = json.loads(run(*plan, "--dtype=int8", "-o", "json").stdout)["moves"]
    assert sum(move["end_layer"] - move["first_layer"] for move in moves) == 4
    assert all(move["after"][0].endswith("int8") for move in moves)
    assert run(*plan, "--from-traffic").returncode == 0

    down = run("down", "tiny")
    assert down.returncode == 0, down.stderr
    assert status() == []
    assert status(f"--ray-address={address}") == []
    assert run("down", "tiny").returncode == 4
    with pytest.raises(Exception, match="Connection error"):
        client.models.list()


def holds_weights(store: Path) -> bool:
    """Any large file whole: not only the pieces that describe the release."""
    shards = [shard.stat() for shard in store.rglob("model-*.safetensors")]
    return any(s.st_blocks * 512 >= s.st_size > 100_000 for s in shards)


def test_four_nodes_fetch_what_they_need_and_answer_as_transformers_also_after_one_died(
    address: str, tmp_path: Path
) -> None:
    release = tmp_path / "tiny-moe"
    model = write_release(release, layout="huggingface")
    prompt = [1, 2, 3]
    with torch.inference_mode():
        whole = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    expected = whole[0, len(prompt) :].tolist()
    total = sum(path.stat().st_size for path in release.iterdir())
    small = sum(p.stat().st_size for p in release.iterdir() if p.suffix != ".safetensors")
    # An address that no node has: nodes shut it out by that when they take from each other.
    with seeding(release, listen="127.0.0.99:0") as seed:
        for share in ("own", "full"):
            with magnetar(
                "up",
                seed.magnet,
                f"--peer={seed.address}",
                f"--ray-address={address}",
                f"--store={tmp_path}/store-{share}-{{host}}",
                "--max-concurrency=4",
                "--stages=4",
                "--name=tiny",
                "--port=0",
                *(["--full"] if share == "full" else []),
            ) as up:
                assert answer(up.until("ready")["url"], prompt, len(expected)) == expected
                (found,) = status()
                if share == "full":
                    assert not any("torch" in each for each in libraries("ray::GatewayActor"))
                    processes = ray_processes("ray::StageActor")
                    assert len(processes) == 4
                    processes[2].kill()
                    assert "died" in up.until("warning")["message"]
                    back = up.until("note")["message"]
                    assert back.startswith("back after: stage ")
                    assert answer(found["url"], prompt, len(expected)) == expected
                    (again,) = status()
                    assert again["url"] == found["url"]
                    assert all(row["num_restarts"] == 1 for row in again["pipelines"])
                    assert received(again) == received(found)  # from what is on the disks
            stages = found["plan"]["pipelines"][0]["stages"]
            assert {stage["host"] for stage in stages} == set(MEMORIES)
            fetched = {each["host"]: each for each in found["fetched"]}
            assert set(fetched) == set(MEMORIES)
            check = everything if share == "full" else shares
            check(list(fetched.values()), total=total, small=small)
    assert status() == []
    assert status(f"--ray-address={address}") == []


def received(found: dict[str, Any]) -> dict[str, int]:
    """By host, all bytes that came."""
    return {node["host"]: node["received_bytes"] for node in found["traffic"]}


def answer(url: str, prompt: list[int], num_tokens: int) -> list[int]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        reply = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=num_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    found: list[int] = reply.choices[0].model_dump()["token_ids"]
    return found


def ray_processes(name: str) -> list[psutil.Process]:
    ours = psutil.Process().children(recursive=True)
    return [process for process in ours if name in "".join(process.cmdline())]


def libraries(name: str) -> list[str]:
    """What the one process of this name has mapped into its memory."""
    (process,) = ray_processes(name)
    return [mapped.path for mapped in process.memory_maps()]


def shares(fetched: list[dict[str, Any]], *, total: int, small: int) -> None:
    """A layer each; embeddings, output head and whole pieces come to some more."""
    wanted = [each["wanted_bytes"] for each in fetched]
    assert all(each < total * 0.35 + small for each in wanted)
    assert total - small <= sum(wanted) - 4 * small <= 1.2 * (total - small)
    # The home node had asked for the pieces that describe the release, too.
    for each in fetched:
        surplus = each["received_bytes"] - each["wanted_bytes"]
        assert 0 <= surplus <= max(total * 0.05, small)


def everything(fetched: list[dict[str, Any]], *, total: int, small: int) -> None:
    """All want what each had a quarter of: they take it from each other."""
    assert {each["wanted_bytes"] for each in fetched} == {total}
    sent = sum(each["sent_bytes"] for each in fetched)
    assert sent > total / 2
    received = sum(each["received_bytes"] for each in fetched)
    assert received - sent <= 1.1 * total


def test_a_model_that_fits_nowhere_says_the_numbers_of_every_node(
    address: str, tmp_path: Path
) -> None:
    release = tmp_path / "tiny-moe"
    write_release(release, layout="huggingface")
    done = run(
        "up",
        str(release),
        f"--ray-address={address}",
        f"--store={tmp_path}/store-{{host}}",
        "--max-concurrency=100000",
        "--max-context=512",
        "--port=0",
    )
    assert done.returncode == 7
    for host in MEMORIES:
        assert host in done.stderr
    assert status(f"--ray-address={address}") == []
