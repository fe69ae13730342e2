"""Inventory files: strict, exact about what is wrong, and the inverse of what `nodes` writes."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from magnetar.cluster.inventory.profiles import profiles
from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.errors import ManifestError, NotFoundError
from magnetar.manifests.inventory import load_inventory
from magnetar.manifests.inventory_document import inventory_document

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "manifests" / "examples"
HEAD = "apiVersion: magnetar/v1\nkind: Inventory\n"


def load(tmp_path: Path, text: str) -> Inventory:
    file = tmp_path / "cluster.yaml"
    file.write_text(HEAD + text)
    return load_inventory(file, environment={})


def test_a_measured_inventory_survives_the_file(tmp_path: Path) -> None:
    devices = (
        Device(
            kind="cpu",
            memory_bytes=12_345_678_901,
            name="cpu of mine",
            read_gbps=18.5,
            dtype_read_gbps=(("fp32", 20.25),),
            gemm_gflops=310.0,
            dtype_gemm_gflops=(("fp32", 155.5),),
            kv_read_gbps=12.25,
            attention_gflops=250.0,
            layer_overhead_s=0.00015,
            step_overhead_s=0.0002,
            helper_overhead_s=0.0004,
        ),
        Device(kind="cuda", index=0, memory_bytes=1000),
        Device(kind="cuda", index=1, memory_bytes=2000),
    )
    inventory = Inventory(
        nodes=(
            Node(host="a", address="", num_cpus=8, devices=devices, disk_free_bytes=7),
            Node(host="b", address="", num_cpus=2, devices=devices[:1], held_bytes=5),
        ),
        links=(Link(source="a", target="b", rtt_s=0.00025, gbps=1.175),),
    )
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(inventory_document(inventory), sort_keys=False))
    assert load_inventory(file, environment={}) == inventory


def test_a_profile_stands_for_a_device_and_count_for_machines(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "nodes:\n- {host: gpu, count: 4, cpus: 16, devices: [{profile: a100-40}]}\n"
        "- {host: mac, devices: [{profile: m4-max, memoryGigabytes: 100}]}\n"
        "defaultLink: {rttMilliseconds: 0.2, gigabytesPerSecond: 1.25}\n"
        "links: [{source: gpu-0, target: mac, rttMilliseconds: 5, gigabytesPerSecond: 0.03}]\n",
    )
    assert [node.host for node in found.nodes] == ["gpu-0", "gpu-1", "gpu-2", "gpu-3", "mac"]
    assert found.nodes[0].devices == (profiles()["a100-40"].device,)
    assert found.nodes[4].devices[0].memory_bytes == 100 * 10**9
    assert found.nodes[4].devices[0].read_gbps == 264.4
    assert len([link for link in found.links if link.rtt_s == 0.005]) == 1
    assert all((link.source, link.target) != ("mac", "gpu-0") for link in found.links)


def test_a_profile_has_overheads_until_the_file_says_others(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "nodes: [{host: a, devices: [{profile: t4}, {profile: t4, layerOverheadMicroseconds: 0}, "
        "{profile: ddr4-2ch, stepOverheadMicroseconds: 20}]}, "
        "{host: b, devices: [{kind: cpu, memoryGigabytes: 1}]}]\n",
    )
    card, lean, host = found.nodes[0].devices
    (plain,) = found.nodes[1].devices
    assert card.layer_overhead_s == profiles()["t4"].device.layer_overhead_s > 0
    assert (lean.layer_overhead_s, lean.step_overhead_s) == (0.0, card.step_overhead_s)
    assert (host.step_overhead_s, host.helper_overhead_s) == (20e-6, card.helper_overhead_s)
    assert plain.layer_overhead_s == plain.step_overhead_s == plain.helper_overhead_s == 0.0


def test_devices_of_a_kind_are_numbered(tmp_path: Path) -> None:
    found = load(tmp_path, "nodes: [{host: a, devices: [{profile: t4}, {profile: l4}]}]\n")
    assert [device.index for device in found.nodes[0].devices] == [0, 1]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nodes: []\n", "nodes: is empty: it needs an entry"),
        ("nodes: [{host: a, devices: []}]\n", "devices: is empty"),
        ("nodes: [{host: a, devices: [{profile: a100}]}]\n", "mean 'a100-40' or 'a100-80'?"),
        ("nodes: [{host: a, devices: [{profile: a100-4}]}]\n", "did you mean 'a100-40'"),
        ("nodes: [{host: a, devices: [{kind: cpu}]}]\n", "needs memoryGigabytes or a profile"),
        ("nodes: [{host: a, devices: [{memoryGigabytes: 1}]}]\n", "needs a kind or a profile"),
        ("nodes: [{host: a, devices: [{kind: cpu, memoryGigabytes: 0}]}]\n", "greater than 0"),
        ("nodes: [{host: a, devices: [{kind: cpu, memoryBytes: -5}]}]\n", "not -5"),
        (
            "nodes: [{host: a, devices: [{profile: t4, readGigabytesPerSecond: .inf}]}]\n",
            "readGigabytesPerSecond",
        ),
        ("nodes: [{host: a, devices: [{profile: t4, gemmGFlops: 1}]}]\n", "'gemmGflops'"),
        ("nodes: [{host: a, dev: []}]\n", "unknown key 'dev'"),
        (
            "nodes: [{host: a, devices: [{profile: t4}]}, {host: a, devices: [{profile: t4}]}]\n",
            "cluster.yaml:3:53: nodes.1.host: a is a node already; give each a name",
        ),
        (
            "nodes: [{host: a, devices: [{profile: t4}]}]\n"
            "links: [{source: a, target: z, rttMilliseconds: 1, gigabytesPerSecond: 1}]\n",
            "cluster.yaml:4:29: links.0.target: 'z' is no node; nodes: a",
        ),
        (
            "nodes: [{host: a, count: 2, devices: [{profile: t4}]}]\n"
            "links: [{source: a-0, target: a-1, rttMilliseconds: 1, gigabytesPerSecond: 1},\n"
            "  {source: a-0, target: a-1, rttMilliseconds: 9, gigabytesPerSecond: 1}]\n",
            "cluster.yaml:5:12: links.1.source: a-0 to a-1 is there already; keep one of the two",
        ),
        (
            "nodes: [{host: a, devices: [{profile: t4}]}]\n"
            "defaultLink: {rttMilliseconds: 1, gigabytesPerSecond: 0}\n",
            "nothing gets through at 0: say how fast",
        ),
        (
            "nodes: [{host: a, devices: [{profile: ddr4-2ch}, {kind: cpu, memoryGigabytes: 1}]}]\n",
            "cluster.yaml:3:50: nodes.0.devices.1: there is a cpu already; join them",
        ),
        (
            "nodes: [{host: a, devices: [{profile: t4, readGigabytesPerSecond: 1.2e12}]}]\n",
            "less than or equal to 100000",
        ),
        (
            "nodes: [{host: a, devices: [{profile: t4}]}]\n"
            "defaultLink: {rttMilliseconds: -1, gigabytesPerSecond: 1}\n",
            "rttMilliseconds",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load(tmp_path, text)
    assert complaint in str(caught.value)
    assert "cluster.yaml:" in str(caught.value)


def test_the_example_is_a_cluster() -> None:
    found = load_inventory(EXAMPLES / "inventory.yaml", environment={})
    assert [node.host for node in found.nodes] == ["box-0", "box-1", "tower", "mini"]
    assert [device.kind for device in found.nodes[2].devices] == ["cuda", "cpu"]
    assert found.nodes[2].devices[1].memory_bytes == 40 * 10**9
    assert len(found.links) == 6  # every pair once


def test_a_missing_file_points_to_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="magnetar nodes -o yaml"):
        load_inventory(tmp_path / "none.yaml", environment={})


def test_every_profile_names_its_source_and_is_sane() -> None:
    assert {"t4", "l4", "a100-40", "a100-80", "h100", "rtx-4090"} <= set(profiles())
    for profile in profiles().values():
        assert profile.source
        assert profile.overheads_source
        assert profile.device.assumed
        assert profile.device.gemm_gflops  # else prompts would cost no more than reading
        assert 1e10 < profile.device.memory_bytes < 1e12
        assert profile.device.read_gbps
        assert 20 < profile.device.read_gbps < 5000


def test_profiles_differ_as_the_devices_do() -> None:
    def ranked(figure: Callable[[Device], float | None], *names: str) -> bool:
        values = [figure(profiles()[name].device) or 0.0 for name in names]
        return all(slower < faster for slower, faster in pairwise(values))

    assert ranked(lambda device: device.read_gbps, "t4", "l4", "rtx-4090", "a100-40", "a100-80")
    assert ranked(lambda device: device.read_gbps, "ddr4-2ch", "ddr5-2ch", "m3-max", "m4-max")
    assert ranked(lambda device: device.gemm_gflops, "t4", "l4", "rtx-4090", "a100-80", "h100")
    assert ranked(lambda device: device.gemm_gflops, "ddr4-2ch", "ddr5-2ch", "ddr5-8ch", "t4")
    assert ranked(lambda device: device.memory_bytes, "t4", "l4", "a100-40", "h100", "ddr5-8ch")
