"""A whole Ray cluster measured by one command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from magnetar.manifests.inventory import load_inventory
from magnetar.tests.ray_cluster import cluster_of_commands

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_nodes_measures_every_node_and_the_links_between_them(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "magnetar.cli", "nodes", "-o", "yaml"]
    with cluster_of_commands(tmp_path, h1=400, h2=500) as address:
        done = subprocess.run(
            [*command, f"--ray-address={address}"], capture_output=True, text=True, timeout=180
        )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "inventory.yaml"
    file.write_text(done.stdout)
    assert json.loads(json.dumps(yaml.safe_load(done.stdout)))["kind"] == "Inventory"
    found = load_inventory(file, environment={})
    assert [node.host for node in found.nodes] == ["h1", "h2"]
    assert [node.devices[0].memory_bytes for node in found.nodes] == [400_000_000, 500_000_000]
    assert all(node.devices[0].read_gbps for node in found.nodes)
    assert {(link.source, link.target) for link in found.links} == {
        ("h1", "h1"),
        ("h2", "h2"),
        ("h1", "h2"),
    }
    for link in found.links:
        assert 0 < link.rtt_s < 1
        assert link.gbps > 0
