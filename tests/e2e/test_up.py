"""The main road: a torrent's magnet link to a served model, by the command as users run it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import OpenAI

from magnetar.settings import data_dir
from magnetar.tests.command import END_S, magnetar
from magnetar.tests.releases import MAX_CONTEXT_TOKENS, ROPE_THETA, write_release
from magnetar.tests.seeder import seeding

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FACTS = [
    f"--rope-theta={ROPE_THETA}",
    "--sliding-window=none",
    f"--max-context={MAX_CONTEXT_TOKENS}",
]


def test_a_torrent_goes_from_its_magnet_to_answers_and_resumes(tmp_path: Path) -> None:
    release = tmp_path / "tiny-moe"
    model = write_release(release, layout="mistral-pth", dtype="bf16")
    prompt = [1, 17, 42, 99, 7]
    with torch.inference_mode():
        full = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    expected = full[0, len(prompt) :].tolist()
    wanted = ["--dtype=fp32", "--stages=2", "--port=0", f"--store={tmp_path / 'store'}", *FACTS]

    # So slow that the stages are up long before everything is there.
    total = sum(path.stat().st_size for path in release.iterdir())
    with seeding(release, upload_bytes_per_s=total // 12) as seed:
        peer = f"--peer={seed.address}"
        with magnetar("up", seed.magnet, peer, *wanted) as up:
            ready = up.until("ready")
            assert up.last("download")["done_bytes"] > 0
            assert layers_before_the_last_piece(up.events) > 0
            ask_in_every_way(ready["url"], ready["model"], prompt, expected)
            up.process.send_signal(signal.SIGTERM)
            assert "magnetar up" in up.until("error")["message"]
            assert up.process.wait(END_S) == 130

    # Nobody has the release now but the store.
    with magnetar("up", seed.magnet, "--timeout=20", *wanted) as up:
        ready = up.until("ready")
        with OpenAI(base_url=f"{ready['url']}/v1", api_key="none", max_retries=0) as client:
            assert [each.id for each in client.models.list()] == [ready["model"]]
        os.killpg(up.process.pid, signal.SIGINT)  # as a terminal does: its children get it too
        assert up.process.wait(END_S) == 130


def layers_before_the_last_piece(events: list[dict[str, Any]]) -> int:
    """How many layers stages had ready when the download was over, by what was said before."""
    readings = [event for event in events if event["event"] == "progress"]
    phases = [(event["phase"], event["finished"]) for event in readings]
    before = readings[: phases.index(("download", True))]
    counts = [event["message"] for event in before if event["phase"] == "load"]
    ready = [
        sum(int(stage.split("/")[0]) for stage in message.removeprefix("layers ready ").split())
        for message in counts
        if message
    ]
    return max(ready, default=0)


def ask_in_every_way(url: str, model: str, prompt: list[int], expected: list[int]) -> None:
    """Completions at once and streamed, by the real client, against transformers."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        complete_both_ways(client, model, prompt, expected)


def complete_both_ways(client: OpenAI, model: str, prompt: list[int], expected: list[int]) -> None:
    """At once and streamed; both must be what transformers says."""
    asked: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": len(expected),
        "temperature": 0,
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }
    reply = client.completions.create(**asked)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(expected)
    assert reply.choices[0].model_dump()["token_ids"] == expected
    streamed = client.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    )
    text = "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
    assert text == reply.choices[0].text


def test_a_port_in_use_is_said_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with magnetar("up", str(tmp_path), f"--port={port}") as up:
            assert str(port) in up.until("error")["message"]
            assert up.process.wait(END_S) == 7


def test_a_release_without_the_facts_ends_with_the_flags_that_give_them(tmp_path: Path) -> None:
    release = tmp_path / "tiny-moe"
    write_release(release, layout="mistral-pth", dtype="bf16")
    with magnetar("up", str(release), "--port=0", f"--store={tmp_path / 'store'}") as up:
        said = up.until("error")["message"]
        assert "--rope-theta" in said
        assert "--sliding-window" in said
        assert "--max-context" in said
        assert up.process.wait(END_S) == 2


def test_a_detached_deployment_outlives_its_command(tmp_path: Path) -> None:
    release = tmp_path / "tiny"
    write_release(release, layout="huggingface")
    command = [sys.executable, "-m", "magnetar.cli"]

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("up", str(release), "--port=0", "--name=apart", f"--store={tmp_path}", "--detach")
    try:
        found = json.loads(run("status", "apart", "--output=json"))
        assert found["ready"]
        client = OpenAI(base_url=f"{found['url']}/v1", api_key="none", max_retries=0)
        assert [each.id for each in client.models.list()] == ["apart"]
        record = json.loads((data_dir() / "deployments" / "apart.json").read_text())
        head = psutil.Process(record["head"]["pid"])
        processes = [head, *head.children(recursive=True)]
        second = ["up", str(release), "--port=0", "--name=apart"]
        assert subprocess.run([*command, *second], capture_output=True).returncode == 2
    finally:
        run("down", "apart")
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert json.loads(run("status", "--output=json")) == []
