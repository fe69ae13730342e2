"""What the gauge measures is of the right size; how fast it is, no test says."""

import pytest

from magnetar.cluster.inventory.measure import DTYPES
from magnetar.cluster.plan import ComputeDtype
from magnetar.serve import gauge
from magnetar.serve.gauge import ModelGauge


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "SLICE_S", 0.0)
    monkeypatch.setattr(gauge, "READ_BYTES", 1 << 18)
    monkeypatch.setattr(gauge, "READ_WIDTH", 256)
    monkeypatch.setattr(gauge, "GEMM_ROWS", 16)


@pytest.mark.parametrize("dtype", DTYPES["cpu"])
def test_every_dtype_of_a_processor_can_be_measured(dtype: ComputeDtype) -> None:
    assert 0.001 < ModelGauge().read_gbps(dtype, "cpu", 1) < 10_000
    assert 0.001 < ModelGauge().gemm_gflops(dtype, "cpu", 1) < 1_000_000


def test_overheads_are_the_time_of_a_small_step() -> None:
    layer_s, step_s = ModelGauge().overhead_s("bf16", "cpu", 1)
    assert 0 <= layer_s < 1
    assert 0 <= step_s < 1
    assert layer_s + step_s > 0


def test_the_number_of_threads_is_as_before() -> None:
    import torch

    before = torch.get_num_threads()
    ModelGauge().read_gbps("bf16", "cpu", before + 1)
    assert torch.get_num_threads() == before


def test_a_processor_is_measured_within_ten_seconds() -> None:
    # Reading, multiplying, and two small models.
    num_slices = 2 * len(DTYPES["cpu"]) + 2
    assert num_slices * _SLICE_S < 5


_SLICE_S = gauge.SLICE_S
