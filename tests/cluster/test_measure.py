"""Measuring this machine: cached, bounded in time, and over the links that serve."""

import time
from pathlib import Path

import pytest

from magnetar.cluster import measure
from magnetar.cluster.inventory import probe_node
from magnetar.cluster.link_cache import remember_links, remembered_links
from magnetar.cluster.link_probe import Echo, probe_link
from magnetar.cluster.plan import Inventory, Link, Node
from magnetar.cluster.survey import rounds
from magnetar.commands.nodes import nodes_table
from magnetar.errors import StageLostError


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    monkeypatch.setattr(measure, "SLICE_S", 0.01)
    monkeypatch.setattr(measure, "_READ_BYTES", 64 << 20)
    monkeypatch.setattr(measure, "_GEMM_SIZE", 128)


@pytest.mark.usefixtures("quick")
def test_speeds_are_measured_once_and_known_to_every_later_probe(tmp_path: Path) -> None:
    node = probe_node("h", "", tmp_path)
    assert node.devices[0].read_gbps is None
    measured = measure.measure_speeds(node)
    device = measured.devices[0]
    assert device.read_gbps
    assert device.gemm_gflops
    assert 0.01 < device.read_gbps < 10_000
    assert dict(device.dtype_read_gbps)["fp32"] > 0.01
    assert measure.measure_speeds(node) == measured
    again = probe_node("h", "", tmp_path).devices[0]
    assert again.read_gbps == device.read_gbps
    assert "GB/s" in nodes_table(Inventory(nodes=(measured,)))


@pytest.mark.usefixtures("quick")
def test_a_damaged_cache_is_measured_anew(tmp_path: Path) -> None:
    (tmp_path / "speeds.json").write_text("{")
    assert measure.measure_speeds(probe_node("h", "", tmp_path)).devices[0].read_gbps


def test_all_slices_of_a_device_stay_under_ten_seconds() -> None:
    # Each of two figures for two dtypes takes a slice, and two runs of it at least.
    assert 2 * len(measure._DTYPES) * measure.SLICE_S < 5


def test_a_link_is_measured_through_the_transport_that_serves() -> None:
    echo = Echo(host="127.0.0.1", secret=b"s" * 32)
    try:
        began = time.perf_counter()
        link = probe_link("a", "b", echo.address, secret=b"s" * 32)
        assert time.perf_counter() - began < 10
        assert 0 < link.rtt_s < 0.1
        assert link.gbps > 0.01
        with pytest.raises(StageLostError):
            probe_link("a", "b", echo.address, secret=b"t" * 32)
    finally:
        echo.close()


def test_measured_links_are_remembered_for_the_same_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    a, b, moved = (
        Node(host=host, address=address, num_cpus=1, devices=())
        for host, address in (("a", "10.0.0.1"), ("b", "10.0.0.2"), ("b", "10.0.0.3"))
    )
    assert remembered_links([a, b]) == ()
    link = Link(source="a", target="b", rtt_s=0.001, gbps=1.5)
    remember_links(Inventory(nodes=(a, b), links=(link,)))
    assert remembered_links([a, b]) == (link,)
    assert remembered_links([a, moved]) == ()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    hosts = [f"h{number}" for number in range(count)]
    met = [frozenset(pair) for pairs in rounds(hosts) for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    for pairs in rounds(hosts):
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))
