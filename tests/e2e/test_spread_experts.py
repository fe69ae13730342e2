"""Experts of a stage on other nodes of a cluster: the same answer, and a death that is said."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI

from magnetar.tests.command import magnetar
from magnetar.tests.ray_cluster import cluster_of_commands
from magnetar.tests.releases import write_release
from magnetar.tests.seeder import seeding

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MANIFEST = """\
apiVersion: magnetar/v1
kind: Deployment
metadata:
  name: tiny
spec:
  source:
    magnet: "{magnet}"
    peers: ["{peer}"]
  model:
    dtype: fp32
  placement:
    rayAddress: {address}
    store: store-{{host}}
{experts}
  serve:
    port: 0
    maxConcurrency: 4
"""
SPREAD = """\
    experts:
    - node: h2
      hold: 0-3/4-7
    - node: h3
      hold: 1-2/0,7
"""
PROMPT: dict[str, Any] = {"model": "tiny-moe", "prompt": [1, 2, 3], "max_tokens": 12}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    with cluster_of_commands(home, h1=900, h2=700, h3=700) as address:
        yield address


def answer(url: str) -> tuple[str, list[float]]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        reply = client.completions.create(**PROMPT, temperature=0, logprobs=1)
    choice = reply.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    return choice.text, [float(logprob or 0) for logprob in choice.logprobs.token_logprobs]


def wanted_bytes(address: str) -> dict[str, int]:
    """What each node fetched of the release."""
    done = subprocess.run(
        [sys.executable, "-m", "magnetar.cli", "status", "tiny", "--output=json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (pipeline,) = found["plan"]["pipelines"]
    assert [helper["host"] for helper in pipeline["stages"][0]["helpers"]] == ["h2", "h3"]
    return {share["host"]: share["wanted_bytes"] for share in found["fetched"]}


def test_experts_on_two_other_nodes_give_the_answer_of_one(address: str, tmp_path: Path) -> None:
    release = tmp_path / "tiny-moe"
    write_release(release, layout="huggingface")
    answers = {}
    with seeding(release, listen="127.0.0.2:0") as seed:
        for name, experts in (("alone", ""), ("spread", SPREAD)):
            manifest = tmp_path / name / "tiny.yaml"
            manifest.parent.mkdir()
            manifest.write_text(
                MANIFEST.format(
                    magnet=seed.magnet, peer=seed.address, address=address, experts=experts
                )
            )
            with magnetar("up", "-f", str(manifest)) as up:
                url = up.until("ready")["url"]
                answers[name] = answer(url)
                if name == "spread":
                    wanted = wanted_bytes(address)
                    assert wanted["h3"] < wanted["h2"] < wanted["h1"]
                    kill_a_helper()
                    back = up.until("note")["message"]
                    assert re.search(r"back after: the helper on h[23] of stage 0 died", back)
                    answers["again"] = answer(url)
    for name in ("spread", "again"):
        assert answers[name][0] == answers["alone"][0]
        assert answers[name][1] == pytest.approx(answers["alone"][1], abs=1e-4)


def kill_a_helper() -> None:
    """One of the two."""
    ours = psutil.Process().children(recursive=True)
    helpers = [each for each in ours if "ray::HelperActor" in "".join(each.cmdline())]
    assert len(helpers) == 2
    helpers[0].kill()
