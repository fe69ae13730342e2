"""What the gauge measures is of the right size; how fast it is, no test says."""

from typing import Any

import pytest

from magnetar.cluster.inventory import pieces
from magnetar.cluster.inventory.link_probe import BULK_S
from magnetar.cluster.inventory.measure import DTYPES
from magnetar.cluster.machines import ComputeDtype
from magnetar.serve import gauge, small_attention
from magnetar.serve.engine.step import StepResult
from magnetar.serve.gauge import ModelGauge
from magnetar.serve.small_model import STREAM_TOKENS, small_stage, small_step

LONGEST_S = pieces.LONGEST_S


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SLICE_S", 0.0)
    monkeypatch.setattr(pieces, "LONGEST_S", 0.0)
    monkeypatch.setattr(gauge, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(gauge, "READ_PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(gauge, "last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(gauge, "READ_INPUTS", 256)
    monkeypatch.setattr(gauge, "GEMM_ROWS", 16)
    monkeypatch.setattr(gauge, "GEMM_WIDTH", 256)
    monkeypatch.setattr(small_attention, "KV_BYTES", 1 << 20)
    monkeypatch.setattr(small_attention, "last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(small_attention, "CONTEXT_TOKENS", 64)
    monkeypatch.setattr(small_attention, "PROMPT_TOKENS", 64)


@pytest.mark.parametrize("dtype", DTYPES["cpu"])
def test_every_dtype_of_a_processor_can_be_measured(dtype: ComputeDtype) -> None:
    assert 0.001 < ModelGauge().read_gbps(dtype, "cpu", 1) < 10_000
    assert 0.001 < ModelGauge().gemm_gflops(dtype, "cpu", 1) < 1_000_000


def test_overheads_are_the_time_of_a_small_step() -> None:
    found = ModelGauge().overheads("bf16", "cpu", 1, read_gbps=20.0)
    assert 0 <= found.layer_s < 1
    assert 0 <= found.step_s < 1
    assert 0 <= found.helper_s < 1
    assert found.layer_s + found.step_s + found.helper_s > 0


def test_attention_can_be_measured() -> None:
    found = ModelGauge().attention("cpu", 1)
    assert 0.001 < found.kv_read_gbps < 10_000
    assert 0.001 < found.gflops < 1_000_000


def test_every_step_of_attention_reads_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[list[list[int]]] = []
    step = small_attention.SmallAttention._step

    def kept(self: Any, position: int, count: int, each: list[list[int]]) -> object:
        if count == 1:
            tables.append(each)
        return step(self, position, count, each)

    monkeypatch.setattr(small_attention.SmallAttention, "_step", kept)
    attention = small_attention.SmallAttention("cpu", 2)
    assert len(attention.decoding) == len(tables) > 1
    blocks = [block for each in tables for table in each for block in table]
    assert len(set(blocks)) == len(blocks)
    assert attention.read_bytes == 2 * 64 * 8 * 128 * 2 * 2


def test_the_number_of_threads_is_as_before() -> None:
    import torch

    before = torch.get_num_threads()
    ModelGauge().read_gbps("bf16", "cpu", before + 1)
    assert torch.get_num_threads() == before


def test_a_busy_processor_is_measured_within_seven_seconds_too() -> None:
    # Reading, multiplying, attention of three kinds, and two small models; then steps to a worker
    # and, by layer, to a helper, and twice the way over loopback.
    num_figures = 2 * len(DTYPES["cpu"]) + 3 + 1 + 2 + 2
    assert num_figures * LONGEST_S + BULK_S < 7


def test_weights_that_are_read_are_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "last_level_cache_bytes", lambda: 3 << 20)
    reader = gauge.WeightReader("bf16", "cpu", 1)
    assert len(reader._products) * reader._held_bytes >= 6 << 20


def test_small_steps_never_have_a_long_context() -> None:
    stage = small_stage(1, dtype="bf16", device="cpu")
    positions = []
    for number in range(2 * STREAM_TOKENS + 1):
        step = small_step(number)
        result = stage.step(step, None)
        assert isinstance(result, StepResult)
        assert result.samples[0].is_finite
        positions.append(step.rows[0].position)
    assert positions == [*range(STREAM_TOKENS), *range(STREAM_TOKENS), 0]
