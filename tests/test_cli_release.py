"""The verbs over a real release: seeded, fetched, verified and inspected by real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from magnetar.commands.demo import Seed, seeded
from magnetar.errors import MagnetarError
from magnetar.fetcher.torrent.magnet import parse_magnet
from magnetar.tests.command import END_S, magnetar
from magnetar.tests.releases import MAX_CONTEXT_TOKENS, ROPE_THETA, write_release
from magnetar.tests.seeder import seeding

FACTS = (
    f"--rope-theta={ROPE_THETA}",
    "--sliding-window=none",
    f"--max-context={MAX_CONTEXT_TOKENS}",
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases") / "tiny-moe"
    write_release(folder, layout="mistral-pth", dtype="bf16")
    return folder


@pytest.fixture(scope="module")
def seed(release: Path) -> Iterator[str]:
    """A magnet link that a process of its own answers."""
    with seeding(release) as info:
        yield info.magnet


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "magnetar.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def data_of(*arguments: str) -> str:
    done = run(*arguments, "--progress", "plain")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_fetch_of_a_manifest_brings_what_it_names_to_where_it_says(
    seed: str, release: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "tiny.yaml"
    manifest.write_text(
        "apiVersion: magnetar/v1\nkind: Deployment\nmetadata: {name: tiny}\nspec:\n"
        f"  source: {{magnet: '{seed}', timeoutSeconds: 20}}\n  placement: {{store: here}}\n"
    )
    folder = Path(data_of("fetch", "-f", str(manifest)))
    assert folder.is_relative_to(tmp_path / "here")
    assert {file.name for file in folder.iterdir()} == {file.name for file in release.iterdir()}
    assert data_of("fetch", "-f", str(manifest), f"--store={tmp_path / 'there'}") != str(folder)
    assert run("fetch", "-f", str(manifest), seed).returncode == 2


def test_fetch_prints_the_folder_and_verify_reads_it_again(
    seed: str, release: Path, tmp_path: Path
) -> None:
    store = f"--store={tmp_path}"
    folder = Path(data_of("fetch", seed, store))
    assert (folder / "params.json").read_bytes() == (release / "params.json").read_bytes()
    weights = folder / "consolidated.00.pth"
    before, times = weights.read_bytes(), weights.stat()

    # A byte that turned on the disk: size and time are as they were.
    damaged = bytearray(before)
    damaged[len(before) // 2] ^= 1
    weights.write_bytes(damaged)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = run("verify", seed, store, "--progress", "json")
    assert done.returncode == 0, done.stderr
    assert weights.read_bytes() == before
    phases = {json.loads(line).get("phase") for line in done.stderr.splitlines()}
    assert {"metadata", "verify"} <= phases


def test_a_dry_run_fetches_nothing_and_only_fetches_a_part(
    seed: str, release: Path, tmp_path: Path
) -> None:
    store = f"--store={tmp_path}"
    whole = json.loads(data_of("fetch", seed, store, "--dry-run", "-o", "json"))
    assert whole["files"] == {path.name: path.stat().st_size for path in release.iterdir()}
    assert whole["missing_bytes"] == sum(whole["files"].values()) <= whole["wanted_bytes"]
    assert not list(tmp_path.rglob("consolidated.00.pth"))

    part = [seed, store, "--only=1-2/0", *FACTS]
    told = json.loads(data_of("fetch", *part, "--dry-run", "-o", "json"))
    assert 0 < told["wanted_bytes"] < whole["wanted_bytes"] / 2
    folder = Path(data_of("fetch", *part))
    assert (folder / "tokenizer.model").read_bytes() == (release / "tokenizer.model").read_bytes()
    assert json.loads(data_of("fetch", *part, "--dry-run", "-o", "json"))["missing_bytes"] == 0
    assert "missing  0 bytes" in data_of("fetch", *part, "--dry-run")

    done = run("fetch", seed, store, "--only=7", *FACTS, "--progress=none")
    assert done.returncode == 2
    assert "no layer 7: the model has 4 layers" in done.stderr


def test_the_store_lists_its_releases_and_says_where_one_is(seed: str, tmp_path: Path) -> None:
    store = f"--store={tmp_path}"
    assert data_of("store", "ls", store) == ""
    folder = data_of("fetch", seed, store)
    (held,) = json.loads(data_of("store", "ls", store, "-o", "json"))
    assert (held["name"], held["complete"], held["folder"]) == ("tiny-moe", True, folder)
    assert "whole  tiny-moe" in data_of("store", "ls", store)
    assert data_of("store", "path", "tiny-moe", store) == folder
    assert data_of("store", "path", held["info_hash"], store) == folder
    missing = run("store", "path", "other", store, "--progress=none")
    assert missing.returncode == 4
    assert "no release called 'other'" in missing.stderr
    assert run("store", "path", store, "--progress=none").returncode == 2


def test_the_store_names_what_is_damaged_and_the_next_fetch_brings_only_that(
    seed: str, release: Path, tmp_path: Path
) -> None:
    store = f"--store={tmp_path}"
    assert data_of("store", "verify", store) == ""
    weights = Path(data_of("fetch", seed, store)) / "consolidated.00.pth"
    assert data_of("store", "verify", "tiny-moe", store).endswith("bytes, all right")

    # A byte that turned on the disk: size and time are as they were.
    before, times = weights.read_bytes(), weights.stat()
    damaged = bytearray(before)
    damaged[len(before) // 2] ^= 1
    weights.write_bytes(damaged)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = run("store", "verify", store, "-o", "json", "--progress=none")
    assert done.returncode == 1
    assert "fetch it again" in done.stderr
    (told,) = json.loads(done.stdout)
    assert len(told["damaged_pieces"]) == 1
    assert told["damaged_tensors"]
    (part,) = told["damaged"]
    assert part["file"] == "consolidated.00.pth"
    assert part["offset"] <= len(before) // 2 < part["offset"] + part["num_bytes"]
    assert not told["is_right"]
    assert json.loads(data_of("store", "ls", store, "-o", "json"))[0]["complete"] is False
    again = json.loads(data_of("fetch", seed, store, "--dry-run", "-o", "json"))
    assert again["wanted_bytes"] > 0
    data_of("fetch", seed, store)
    assert weights.read_bytes() == before
    assert data_of("store", "verify", store).endswith("bytes, all right")


def test_gc_says_what_goes_and_deletes_it_when_asked_to(seed: str, tmp_path: Path) -> None:
    store = f"--store={tmp_path}"
    folder = Path(data_of("fetch", seed, store))
    assert data_of("store", "gc", store).endswith("tiny-moe: kept, used lately")
    assert data_of("store", "gc", store, "--older-than=0s", "--dry-run").endswith(
        "would be deleted"
    )
    assert folder.exists()
    told = json.loads(data_of("store", "gc", store, "--older-than=0s", "-o", "json"))
    assert told["freed_bytes"] > 0
    assert [each["name"] for each in told["releases"]] == ["tiny-moe"]
    assert not folder.exists()
    assert data_of("store", "ls", store) == ""
    for wrong in (("gc", "tiny-moe"), ("ls", "--dry-run"), ("path",)):
        assert run("store", *wrong, store, "--progress=none").returncode == 2


def test_verify_of_what_is_not_in_the_store_is_not_found(seed: str, tmp_path: Path) -> None:
    done = run("verify", seed, f"--store={tmp_path}", "--progress", "plain")
    assert done.returncode == 4
    assert "fetch it first" in done.stderr


def test_verify_of_a_folder_checks_its_sums(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_release(folder, layout="mistral-pth", dtype="bf16")
    store = f"--store={tmp_path / 'store'}"
    assert data_of("verify", str(folder), store) == str(folder)
    weights = folder / "consolidated.00.pth"
    times = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = run("verify", str(folder), store, "--progress", "plain")
    assert done.returncode == 1
    assert "md5" in done.stderr


def test_inspect_needs_heads_and_tails_alone(seed: str, tmp_path: Path) -> None:
    store = f"--store={tmp_path}"
    told = json.loads(data_of("inspect", seed, store, "-o", "json", *FACTS))
    assert told["layout"] == "mistral-pth"
    assert told["config"]["num_experts"] == 8
    assert told["dtype"] == "bf16"
    assert told["bytes"] == sum(group["bytes"] for group in told["groups"].values())
    assert told["bytes"] == sum(told["files"].values()) == 2 * told["parameters"]
    assert told["active_parameters"] < told["parameters"]
    table = data_of("inspect", seed, store, *FACTS, "--nodes=2")
    assert "layers over 2 nodes, pieces of 16 KiB (this torrent's)" in table
    assert "experts over 2 nodes" in table
    assert "8, 2 per token" in table
    assert "none (a base model)" in table


def test_inspect_without_the_facts_names_the_flags(release: Path, tmp_path: Path) -> None:
    done = run("inspect", str(release), f"--store={tmp_path}", "--progress", "plain")
    assert done.returncode == 2
    for flag in ("--rope-theta", "--sliding-window", "--max-context"):
        assert flag in done.stderr


def test_plan_prints_the_placement_as_a_table_and_as_json(release: Path, tmp_path: Path) -> None:
    wanted = [str(release), f"--store={tmp_path}", *FACTS, "--stages=2"]
    table = data_of("plan", *wanted)
    assert "+ embeddings" in table
    assert re.search(r"^to fetch: nothing, for all is there$", table, re.MULTILINE)
    plan = json.loads(data_of("plan", *wanted, "-o", "json"))
    layers = [
        (stage["first_layer"], stage["end_layer"]) for stage in plan["pipelines"][0]["stages"]
    ]
    assert layers[0][0] == 0
    assert layers[0][1] == layers[1][0]
    assert len(layers) == 2
    assert yaml.safe_load(data_of("plan", *wanted, "-o", "yaml")).keys() == plan.keys()
    picture = ElementTree.fromstring(data_of("plan", *wanted, "-o", "svg"))
    assert picture.tag.endswith("svg")


def test_a_difference_needs_a_deployment_that_runs(release: Path, tmp_path: Path) -> None:
    wanted = [str(release), f"--store={tmp_path}", *FACTS, "--progress=none"]
    done = run("plan", *wanted, "--diff=nothing-of-that-name")
    assert done.returncode == 4
    assert "nothing-of-that-name" in done.stderr


def test_plan_from_a_manifest_fetches_nothing_but_the_description(
    release: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "apiVersion: magnetar/v1\nkind: Deployment\nmetadata: {name: x}\nspec:\n"
        f"  source: {{folder: {release}, ropeTheta: {ROPE_THETA}, slidingWindow: none,\n"
        f"           maxContextTokens: {MAX_CONTEXT_TOKENS}}}\n"
        "  placement: {store: store, stages: 3}\n"
    )
    plan = json.loads(data_of("plan", "-f", str(file), "-o", "json"))
    assert [stage["index"] for stage in plan["pipelines"][0]["stages"]] == [0, 1, 2]


def test_more_stages_than_layers_is_usage(release: Path, tmp_path: Path) -> None:
    done = run("plan", str(release), f"--store={tmp_path}", *FACTS, "--stages=9", "--progress=none")
    assert done.returncode == 2
    assert "9 stages for a model of 4 layers" in done.stderr


def test_too_long_a_context_is_told_with_numbers_before_anything_starts(
    release: Path, tmp_path: Path
) -> None:
    facts = [*FACTS[:2], "--max-context=100000000", "--max-concurrency=1000"]
    done = run("plan", str(release), f"--store={tmp_path}", *facts, "--progress=none")
    assert done.returncode == 7, done.stderr
    assert "GB" in done.stderr


def test_unreachable_peer_times_out(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: nothing answers there
        peer = f"127.0.0.1:{nobody.getsockname()[1]}"
        link = "magnet:?xt=urn:btih:" + "ab" * 20
        done = run(
            "fetch", link, "--peer", peer, "--timeout=1", f"--store={tmp_path}", "--progress=plain"
        )
    assert done.returncode == 6, done.stderr
    assert done.stderr.splitlines()[-1].startswith("magnetar: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_a_fetch_and_says_how_to_resume(
    number: signal.Signals, tmp_path: Path
) -> None:
    link = "magnet:?xt=urn:btih:" + "ab" * 20
    arguments = ["fetch", link, "--peer", "127.0.0.1:1", f"--store={tmp_path}"]
    with magnetar(*arguments) as fetch:
        fetch.until("progress")
        fetch.process.send_signal(number)
        assert "stopping" in fetch.until("note")["message"]
        told = fetch.until("error")
        assert fetch.process.wait(END_S) == told["exit_code"] == 130
    assert f"magnetar fetch '{link}'" in told["message"]


def test_seed_prints_a_link_that_names_it_and_stops_when_stdin_closes(
    release: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "magnetar.cli", "seed", str(release), "-o", "json"]
    with subprocess.Popen(
        [*command, "--stop-on-eof", f"--store={tmp_path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert parse_magnet(told["magnet"]).peers == (told["address"],)
        process.stdin.close()
        assert process.wait(END_S) == 0


def test_seed_of_the_demo_is_a_process_that_ends_with_the_block(
    release: Path, tmp_path: Path
) -> None:
    with seeded(release, tmp_path, threading.Event()) as found:
        assert isinstance(found, Seed)
        folder = data_of("fetch", found.magnet, f"--store={tmp_path / 'store'}")
        assert Path(folder).name == release.name
    host, _, port = found.address.rpartition(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


def test_seed_that_does_not_start_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with (
        pytest.raises(MagnetarError, match="there is no folder"),
        seeded(missing, tmp_path, threading.Event()),
    ):
        pass


def test_plans_for_machines_of_an_inventory_file(release: Path, tmp_path: Path) -> None:
    machines = tmp_path / "machines.yaml"
    machines.write_text(
        "apiVersion: magnetar/v1\nkind: Inventory\n"
        "nodes:\n- {host: card, cpus: 4, devices: [{profile: t4}]}\n"
        "- {host: board, devices: [{kind: cpu, memoryGigabytes: 8, readGigabytesPerSecond: 0.1}]}\n"
    )
    plan = json.loads(
        data_of("plan", str(release), *FACTS, "--inventory", str(machines), "-o", "json")
    )
    assert [stage["host"] for stage in plan["pipelines"][0]["stages"]] == ["card"]
    assert plan["prediction"]["tokens_per_s"] > 0
    assert [idle["host"] for idle in plan["unused"]] == ["board"]


def test_a_release_of_the_catalogue_is_planned_without_asking_anybody(tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "manifests" / "examples" / "inventory.yaml"
    table = data_of(
        "plan", "mixtral-8x7b", f"--store={tmp_path / 'store'}", f"--inventory={example}"
    )
    assert table.startswith("plan for mixtral-8x7b (93.4 GB in bf16), 8 x 32768 tokens")
    assert not (tmp_path / "store").exists()


def test_experts_that_a_manifest_places_have_times_too(release: Path, tmp_path: Path) -> None:
    machines, file = tmp_path / "machines.yaml", tmp_path / "x.yaml"
    machines.write_text(
        "apiVersion: magnetar/v1\nkind: Inventory\nnodes:\n"
        "- {host: card, count: 2, cpus: 4, devices: [{profile: t4}]}\n"
    )
    file.write_text(
        "apiVersion: magnetar/v1\nkind: Deployment\nmetadata: {name: x}\nspec:\n"
        f"  source: {{folder: {release}, ropeTheta: {ROPE_THETA}, slidingWindow: none,\n"
        f"           maxContextTokens: {MAX_CONTEXT_TOKENS}}}\n"
        "  placement: {experts: [{node: card-1, hold: 0-3/6-7}]}\n"
    )
    asked = ["plan", "-f", str(file), f"--inventory={machines}"]
    (line,) = [row for row in data_of(*asked).splitlines() if "card-1" in row and "6-7" in row]
    assert line.count(" ms") == 2
    text = data_of(*asked, "-o", "yaml")
    assert "- [6, 7]\n" in text
    (pipeline,) = yaml.safe_load(text)["pipelines"]
    (stage,) = pipeline["stages"]
    (helper,) = stage["helpers"]
    assert helper["experts"] == [[6, 7]] * 4
    # A token needs one of the two in 13 of 28 cases, and then waits for the way there and back.
    assert stage["step_s"] > helper["hop_s"] * 4 * 13 / 28
