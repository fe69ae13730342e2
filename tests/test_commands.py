"""Arguments become the deployment that is asked for, and results become text."""

import io
import json
import shlex
from pathlib import Path

import pytest

from magnetar.cluster.plan import NodeWish
from magnetar.cluster.spec import DeploymentSpec
from magnetar.commands.console import Console
from magnetar.commands.parser import build_parser
from magnetar.commands.serving import how_to_ask, status_table
from magnetar.commands.wishes import wanted
from magnetar.errors import UsageError
from magnetar.fetcher.config import ReleaseHints
from magnetar.fetcher.rates import RateLimits
from magnetar.fetcher.torrent.traffic import Traffic
from magnetar.settings import default_store

SILENT = Console("none", out=io.StringIO(), err=io.StringIO())


def spec_of(*arguments: str) -> tuple[DeploymentSpec, str | None]:
    return wanted(build_parser().parse_args(arguments), SILENT)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "release").mkdir()
    file = tmp_path / "x.yaml"
    file.write_text(
        "apiVersion: magnetar/v1\nkind: Deployment\nmetadata: {name: from-file}\n"
        "spec:\n"
        "  source: {folder: release, peers: ['10.0.0.1:1'], ropeTheta: 5, timeoutSeconds: 9,\n"
        "    downloadLimit: 3MB, uploadLimit: 1MiB}\n"
        "  model: {name: Named, dtype: bf16, maxContextTokens: 100, batchInvariant: true}\n"
        "  placement: {stages: 3, rayAddress: '10.0.0.1:6379', store: store, "
        "objective: throughput}\n"
        "  serve: {port: 9000, maxConcurrency: 2, maxRunning: 9, maxWaiting: 0}\n"
    )
    return file


def test_what_nodes_may_be_used_for_joins_what_the_manifest_says(manifest: Path) -> None:
    text = manifest.read_text().replace(
        "placement: {", "placement: {nodes: [{node: a, layers: 0-3}, {node: b, exclude: true}], "
    )
    manifest.write_text(text)
    spec, _ = spec_of("plan", "-f", str(manifest), "--limit", "b=1.5GB", "--pin", "b=4-7")
    assert spec.node_wishes == (
        NodeWish(host="a", layers=(0, 4)),
        NodeWish(host="b", memory_bytes=1_500_000_000, layers=(4, 8)),
    )
    spec, _ = spec_of("up", "mixtral-8x7b", "--exclude", "c", "--exclude", "d", "--pin=e=3")
    assert spec.node_wishes == (
        NodeWish(host="c", exclude=True),
        NodeWish(host="d", exclude=True),
        NodeWish(host="e", layers=(3, 4)),
    )


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--limit=a=24", "'a=24' is no NODE=SIZE, such as a=24GB"),
        ("--limit=a=0GB", "is no NODE=SIZE"),
        ("--limit=24GB", "is no NODE=SIZE"),
        ("--pin=a", "'a' is no NODE=LAYERS, such as a=0-7"),
        ("--pin=a=7-0", "'7-0' ends before it begins: write 0-7"),
    ],
)
def test_a_wish_for_a_node_in_another_form_is_refused(
    option: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        spec_of("plan", "mixtral-8x7b", option)
    assert complaint in capsys.readouterr().err


def test_source_alone_takes_every_default() -> None:
    spec, ray_address = spec_of("up", "mixtral-8x7b")
    assert ray_address is None
    assert (spec.name, spec.model_name) == ("mixtral-8x7b", "mixtral-8x7b")
    assert (spec.host, spec.port, spec.max_concurrency) == ("127.0.0.1", 8080, 8)
    assert not spec.batch_invariant
    assert (spec.max_running, spec.running_limit, spec.max_waiting) == (None, 64, 256)
    assert (spec.dtype, spec.num_stages, spec.max_context_tokens) == (None, None, None)
    assert spec.store == str(default_store())
    assert spec.source.given == ReleaseHints()


def test_every_option_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec, ray_address = spec_of(
        *("up", "mixtral-8x7b", "--name", "My_Model", "--host", "0.0.0.0", "--port", "0"),
        *(
            "--stages",
            "4",
            "--pipelines",
            "2",
            "--dtype",
            "fp32",
            "--store",
            "s",
            "--peer",
            "10.0.0.1:1",
        ),
        *("--peer", "[::1]:2", "--timeout", "1.5", "--rope-theta", "1e4", "--sliding-window"),
        *("none", "--max-context", "512", "--max-concurrency", "3", "--chat-format", "chatml"),
        *("--api-key-file", "key", "--ray-address", "10.0.0.1:6379"),
        *("--max-running", "70", "--max-waiting", "0", "--batch-invariant"),
        *("--download-limit", "20MB", "--upload-limit", "0"),
    )
    assert ray_address == "10.0.0.1:6379"
    assert (spec.name, spec.model_name) == ("my-model", "My_Model")
    assert (spec.host, spec.port, spec.max_concurrency) == ("0.0.0.0", 0, 3)
    assert (spec.running_limit, spec.max_waiting, spec.batch_invariant) == (70, 0, True)
    assert (spec.dtype, spec.num_stages, spec.max_context_tokens) == ("fp32", 4, 512)
    assert spec.num_pipelines == 2
    assert (spec.store, spec.api_key_file) == (str(tmp_path / "s"), str(tmp_path / "key"))
    assert (spec.source.peers, spec.source.timeout_s) == (("10.0.0.1:1", "[::1]:2"), 1.5)
    assert spec.source.limits == RateLimits(download_bytes_per_s=20_000_000, upload_bytes_per_s=0)
    assert spec.source.given == ReleaseHints(
        rope_theta=1e4, sliding_window="none", max_context_tokens=512, chat_format="chatml"
    )


def test_manifest_says_it_all(manifest: Path) -> None:
    spec, ray_address = spec_of("up", "-f", str(manifest))
    assert ray_address == "10.0.0.1:6379"
    assert (spec.name, spec.model_name, spec.dtype) == ("from-file", "Named", "bf16")
    assert (spec.num_stages, spec.max_context_tokens, spec.port) == (3, 100, 9000)
    assert spec.batch_invariant
    assert spec.objective == "throughput"
    assert spec.store == str(manifest.parent / "store")
    assert spec.source.given.rope_theta == 5.0
    assert spec.source.timeout_s == 9.0
    assert spec.source.limits == RateLimits(
        download_bytes_per_s=3_000_000, upload_bytes_per_s=1 << 20
    )


def test_options_win_over_the_manifest(manifest: Path) -> None:
    spec, ray_address = spec_of(
        *("up", "-f", str(manifest), "--port", "0", "--stages", "1", "--peer", "10.0.0.2:2"),
        *(
            "--upload-limit",
            "5k",
            "--rope-theta",
            "6",
            "--ray-address",
            "auto",
            "--name",
            "other",
            "--objective",
            "fit",
        ),
    )
    assert ray_address == "auto"
    assert spec.objective == "fit"
    assert (spec.name, spec.model_name, spec.port, spec.num_stages) == ("other", "other", 0, 1)
    assert spec.source.peers == ("10.0.0.1:1", "10.0.0.2:2")
    assert spec.source.given.rope_theta == 6.0
    assert spec.source.limits == RateLimits(
        download_bytes_per_s=3_000_000, upload_bytes_per_s=5_000
    )
    assert (spec.max_concurrency, spec.running_limit, spec.max_waiting) == (2, 9, 0)


def test_source_and_manifest_exclude_each_other(manifest: Path) -> None:
    for arguments in (("up",), ("plan", "x", "-f", str(manifest))):
        with pytest.raises(UsageError, match="either SOURCE or -f FILE"):
            spec_of(*arguments)


@pytest.mark.parametrize("chats", [True, False])
def test_curl_line_and_snippet_ask_what_the_model_can_answer(chats: bool) -> None:
    text = how_to_ask("http://127.0.0.1:1", model_name="it's", chats=chats, api_key_file=None)
    url, curl, snippet = text.strip().split("\n\n")
    assert url == "http://127.0.0.1:1"
    assert max(map(len, text.splitlines())) < 80
    words = shlex.split(curl)
    assert words[1].endswith("/v1/chat/completions" if chats else "/v1/completions")
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's"
    assert ("messages" in body) == chats
    compile(snippet, "snippet", "exec")
    assert ("chat.completions" in snippet) == chats


def test_curl_line_and_snippet_read_the_key_from_its_file() -> None:
    text = how_to_ask("http://h:1", model_name="m", chats=True, api_key_file="/keys/my key")
    assert "$(cat '/keys/my key')" in text
    assert "open('/keys/my key').read().strip()" in text


def test_status_table_lists_and_details() -> None:
    serving = {
        "name": "a",
        "phase": "serving",
        "ready": True,
        "model_name": "m",
        "url": "http://127.0.0.1:1",
        "failure": None,
        "conditions": [
            {"type": "Ready", "status": True, "reason": "Serving", "message": ""},
        ],
        "plan": {
            "pipelines": [
                {
                    "stages": [
                        {
                            "index": 0,
                            "first_layer": 0,
                            "end_layer": 4,
                            "host": "h",
                            "device": "cpu",
                            "dtype": "bf16",
                        }
                    ]
                }
            ]
        },
    }
    idle = Traffic().to_json() | {"host": "idle"}
    busy = Traffic(received_bytes=3000, lan_received_bytes=1000, sent_bytes=20, lan_sent_bytes=20)
    serving["traffic"] = [idle, busy.to_json() | {"host": "h"}]
    lost = {"name": "bb", "phase": "lost", "ready": False, "message": "its process is gone"}
    lines = status_table([serving, lost], details=False).splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "READY", "MODEL", "URL"]
    assert lines[1].split() == ["a", "serving", "yes", "m", "http://127.0.0.1:1"]
    assert lines[2].split() == ["bb", "lost", "no", "-", "-"]
    assert lines[3] == "bb: its process is gone"
    details = status_table([serving], details=True)
    assert "stage 0: layers 0-3 on h (cpu, bf16)" in details
    assert "yes  Ready" in details
    assert "node h: 2.00 kB from outside, 1.00 kB from nodes, 20 B to nodes" in details
    assert "idle" not in details


def test_status_tells_of_each_pipeline_and_of_what_is_amiss() -> None:
    stage = {"index": 0, "first_layer": 0, "end_layer": 4, "device": "cpu", "dtype": "bf16"}
    pipelines = [{"stages": [stage | {"host": host}]} for host in "hi"]
    message = "1 of 2 pipelines lost, requests go to the others: pipeline 1: it died"
    conditions = [
        {
            "type": "AllPipelinesUp",
            "status": False,
            "reason": "PipelineLost",
            "message": message,
            "last_transition_time": "noon",
        },
        {"type": "Ready", "status": True, "reason": "Serving", "message": ""},
    ]
    serving = {
        "name": "a",
        "phase": "serving",
        "ready": True,
        "conditions": conditions,
        "loaded": [{"pipeline": 1, "index": 0, "num_layers": 3}],
        "plan": {"pipelines": pipelines},
        "pipelines": [
            {"number": 0, "state": "up", "since": "dawn", "num_restarts": 0, "cause": ""},
            {
                "number": 1,
                "state": "starting",
                "since": "noon",
                "num_restarts": 2,
                "num_failures": 3,
                "cause": "it died",
            },
        ],
    }
    lines = status_table([serving], details=True).splitlines()
    assert lines[1].split() == ["a", "serving", "yes", "-", "-"]
    assert lines[2] == f"a: {message}"
    assert f"  no   AllPipelinesUp   PipelineLost  since noon: {message}" in lines
    assert lines[-3] == "  pipeline 0, stage 0: layers 0-3 on h (cpu, bf16)"
    assert lines[-2] == "  pipeline 1, stage 0: layers 0-3 on i (cpu, bf16), 3 ready"
    assert lines[-1] == (
        "  pipeline 1: being started again since noon, restarts: 2, failures in a row: 3, "
        "lost by: it died"
    )
