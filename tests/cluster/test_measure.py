"""Measuring this machine: cached, bounded in time, and over the links that serve."""

import json
import re
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from magnetar.cluster.inventory.inventory import probe_node
from magnetar.cluster.inventory.link_cache import remember_links, remembered_links
from magnetar.cluster.inventory.link_probe import Echo, probe_link
from magnetar.cluster.inventory.measure import (
    AttentionSpeed,
    Overheads,
    measure_speeds,
    with_known_speeds,
)
from magnetar.cluster.inventory.other_work import OtherWork
from magnetar.cluster.machines import ComputeDtype, Inventory, Link, Node
from magnetar.cluster.runtime.survey import rounds
from magnetar.commands.nodes_view import nodes_table
from magnetar.errors import StageLostError
from magnetar.manifests.inventory import load_inventory
from magnetar.manifests.inventory_document import inventory_document


class FixedGauge:
    """A machine that reads a gigabyte per second and thread, and counts what it was asked."""

    def __init__(self) -> None:
        self.num_calls = 0

    def read_gbps(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        self.num_calls += 1
        return (2.0 if dtype == "fp32" else 1.0) * num_threads

    def gemm_gflops(self, dtype: ComputeDtype, device: str, num_threads: int) -> float:
        return 100.0 * num_threads

    def attention(self, device: str, num_threads: int) -> AttentionSpeed:
        return AttentionSpeed(kv_read_gbps=0.75 * num_threads, gflops=80.0 * num_threads)

    def overheads(
        self, dtype: ComputeDtype, device: str, num_threads: int, *, read_gbps: float
    ) -> Overheads:
        assert read_gbps == self.read_gbps(dtype, device, num_threads)
        return Overheads(layer_s=0.001, step_s=0.002, helper_s=0.003)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGNETAR_HOME", str(tmp_path))
    return tmp_path


def test_speeds_are_measured_once_and_known_to_every_later_probe(home: Path) -> None:
    node = replace(probe_node("h", "", home), num_cpus=4)
    assert node.devices[0].read_gbps is None
    gauge = FixedGauge()
    measured = measure_speeds(node, gauge)
    device = measured.devices[0]
    assert device.read_gbps == 4.0
    assert dict(device.dtype_read_gbps)["fp32"] == 8.0
    assert device.gemm_gflops == 400.0
    assert (device.kv_read_gbps, device.attention_gflops) == (3.0, 320.0)
    assert (device.layer_overhead_s, device.step_overhead_s) == (0.001, 0.002)
    assert device.helper_overhead_s == 0.003
    num_calls = gauge.num_calls
    assert measure_speeds(node, gauge) == measured
    assert gauge.num_calls == num_calls
    table = nodes_table(Inventory(nodes=(measured,)))
    assert "4.0 GB/s" in table
    assert re.search(r"^node +device +bf16 +fp32\b", table, re.MULTILINE)
    assert re.search(r"^\S+ +cpu +GB/s +4\.0 +8\.0\b", table, re.MULTILINE)
    assert re.search(r"^ +GFLOP/s +400\b", table, re.MULTILINE)
    assert max(map(len, nodes_table(Inventory(nodes=(measured,)), width=60).splitlines())) <= 60
    assert with_known_speeds(node) == measured


def test_other_work_is_what_neither_idles_nor_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    every = namedtuple("every", "user system idle iowait steal guest")
    own = namedtuple("own", "user system children_user children_system")
    now = [every(100.0, 10.0, 50.0, 5.0, 1.0, 40.0), own(2.5, 1.0, 0.5, 0.0)]
    process = SimpleNamespace(cpu_times=lambda: now[1], children=lambda recursive: [])
    monkeypatch.setattr(psutil, "cpu_times", lambda: now[0])
    monkeypatch.setattr(psutil, "Process", lambda: process)
    others = OtherWork()
    assert others.share() == 0.0
    # Of 10 s more on all processors we had 1, children that have ended 2, nobody 2; 1 was stolen.
    now[:] = [every(106.0, 11.0, 51.0, 6.0, 2.0, 44.0), own(3.0, 1.5, 2.0, 0.5)]
    assert others.share() == pytest.approx(0.5)


def test_a_node_that_was_busy_when_it_was_measured_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherWork, "share", lambda _: 0.62)
    node = measure_speeds(probe_node("h", "", home), FixedGauge())
    assert "h was busy: other work took 62 %" in nodes_table(Inventory(nodes=(node,)))
    (home / "inventory.json").write_text(json.dumps(inventory_document(Inventory(nodes=(node,)))))
    assert load_inventory(home / "inventory.json", environment={}).nodes[0].busy_share == 0.62
    monkeypatch.setattr(OtherWork, "share", lambda _: 0.02)
    node = measure_speeds(node, FixedGauge(), again=True)
    assert "busy" not in nodes_table(Inventory(nodes=(node,)))


def test_a_guest_that_computes_for_a_moment_does_not_show(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge, rates = FixedGauge(), iter([50.0, 40.0, 60.0, 70.0, 25.0, 80.0, 60.0, 70.0])
    monkeypatch.setattr(gauge, "gemm_gflops", lambda *_: next(rates))
    device = measure_speeds(probe_node("h", "", home), gauge).devices[0]
    assert device.gemm_gflops == 50.0
    assert dict(device.dtype_gemm_gflops) == {"fp32": 80.0, "int8": 60.0, "int4": 70.0}


def test_again_measures_again(home: Path) -> None:
    node, gauge = probe_node("h", "", home), FixedGauge()
    measure_speeds(node, gauge)
    num_calls = gauge.num_calls
    measure_speeds(node, gauge, again=True)
    assert gauge.num_calls == 2 * num_calls


def test_a_damaged_cache_is_measured_anew(home: Path) -> None:
    (home / "speeds.json").write_text("{")
    assert measure_speeds(probe_node("h", "", home), FixedGauge()).devices[0].read_gbps


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
    link = Link(source="a", target="b", rtt_s=0.001, gbps=1.5, overhead_s=0.0)
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
