"""What contexts and prompts cost: the formulas by hand, and the figures that they stand on."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.machines import Device, Inventory, Link, Node
from magnetar.cluster.plan import Workload
from magnetar.cluster.search.cost import (
    TOKEN_ID_BYTES,
    ModelCost,
    Speed,
    attention_s,
    chunk_context,
    decode_scores_s,
    device_speed,
    hop_s,
    model_cost,
    output_s,
    prefill_layer_s,
    prompt_scores_s,
    shared_s,
)
from magnetar.cluster.search.place import places_of
from magnetar.cluster.search.placing import Placing
from magnetar.cluster.search.weighed import WeighedModel
from magnetar.tests.planning import MIXTRAL

MODEL = model_cost(*MIXTRAL, "bf16")
CPU = Device(
    kind="cpu",
    memory_bytes=1,
    read_gbps=40.0,
    dtype_read_gbps=(("int4", 30.0),),
    gemm_gflops=400.0,
    dtype_gemm_gflops=(("int4", 200.0),),
    kv_read_gbps=25.0,
    attention_gflops=320.0,
)


def speed_of(device: Device, dtype: str = "bf16") -> Speed:
    found = device_speed(device, dtype)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_decoding_reads_keys_and_values_at_a_speed_of_their_own() -> None:
    # Two bytes of 8 heads of 128, a key and a value.
    read_s = 16 * 1000 * 4096 / 25e9
    found = decode_scores_s(MODEL, speed_of(CPU), tokens=16, context_tokens=1000)
    assert found == pytest.approx(read_s)


def test_a_prompt_is_paid_by_its_scores() -> None:
    scores = 512 * 2000 * 32
    found = prompt_scores_s(MODEL, speed_of(CPU), tokens=512, context_tokens=2000)
    assert found == pytest.approx(scores * 4 * 128 / 320e9)


def test_smaller_heads_have_as_many_scores_to_weigh() -> None:
    small = replace(MODEL, head_dim=64)
    products_s = 4 * small.head_dim / 400e9
    weighing_s = 4 * 128 * (1 / 320e9 - 1 / 400e9)
    found = prompt_scores_s(small, speed_of(CPU), tokens=100, context_tokens=1000)
    assert found == pytest.approx(100 * 1000 * small.num_heads * (products_s + weighing_s))


def test_attention_does_not_depend_on_how_weights_are_held() -> None:
    for scores_s in (decode_scores_s, prompt_scores_s):
        found = {
            dtype: scores_s(MODEL, speed_of(CPU, dtype), tokens=8, context_tokens=500)
            for dtype in ("bf16", "int4")
        }
        assert found["bf16"] == found["int4"]


def test_who_was_not_measured_reads_them_like_weights_and_attends_like_products() -> None:
    bare = speed_of(Device(kind="cpu", memory_bytes=1, read_gbps=40.0, gemm_gflops=400.0))
    assert (bare.kv_read_gbps, bare.score_gflops, bare.score_s) == (40.0, 400.0, 0.0)
    unknown = speed_of(Device(kind="cpu", memory_bytes=1, read_gbps=40.0))
    assert decode_scores_s(MODEL, unknown, tokens=1, context_tokens=10) == 10 * 4096 / 40e9


def test_attention_that_was_seen_faster_than_products_is_taken_as_fast() -> None:
    odd = Device(
        kind="cpu", memory_bytes=1, read_gbps=40.0, gemm_gflops=100.0, attention_gflops=300.0
    )
    assert speed_of(odd).score_s == 0


def test_a_window_hides_the_keys_before_it() -> None:
    narrow = replace(MODEL, window=256)
    at = speed_of(CPU)
    for scores_s in (decode_scores_s, prompt_scores_s):
        beyond = scores_s(narrow, at, tokens=4, context_tokens=9000)
        assert beyond == scores_s(narrow, at, tokens=4, context_tokens=256)
        assert beyond < scores_s(MODEL, at, tokens=4, context_tokens=9000)


@given(
    position=st.integers(0, 5000),
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=6),
)
def test_a_prompt_has_as_many_scores_however_it_is_cut(position: int, sizes: list[int]) -> None:
    scores, at = 0.0, position
    for size in sizes:
        scores += size * chunk_context(at, size)
        at += size
    assert scores == pytest.approx(sum(range(position + 1, at + 1)))


@given(
    tokens=st.integers(1, 512),
    context=st.integers(1, 30000),
    more=st.integers(1, 10000),
)
def test_longer_contexts_cost_more_and_nothing_else_does(
    tokens: int, context: int, more: int
) -> None:
    at, layer = speed_of(CPU), 3

    def mixed(decoding: int, prompt: int) -> float:
        return attention_s(
            MODEL,
            layer,
            at,
            tokens=tokens,
            context_tokens=decoding,
            prompt_tokens=tokens,
            prompt_context_tokens=prompt,
        )

    bare = shared_s(MODEL, layer, at, tokens=2 * tokens)
    assert bare < mixed(context, 0) < mixed(context + more, 0) < mixed(context + more, context)
    assert bare < mixed(0, context) < mixed(0, context + more)


def placing(*rates: float, step_overhead_s: float = 0.0) -> Placing:
    """Mixtral on nodes that read and multiply at these rates."""
    config, index = MIXTRAL
    nodes = tuple(
        Node(
            host=f"n{number}",
            address="",
            num_cpus=1,
            devices=(
                Device(
                    kind="cpu",
                    memory_bytes=10**12,
                    read_gbps=rate,
                    gemm_gflops=10 * rate,
                    step_overhead_s=step_overhead_s,
                ),
            ),
        )
        for number, rate in enumerate(rates)
    )
    links = tuple(
        Link(source=f"n{a}", target=f"n{b}", rtt_s=0.001, gbps=1.0)
        for a in range(len(rates))
        for b in range(len(rates))
    )
    inventory = Inventory(nodes=nodes, links=links)
    workload = Workload(max_context_tokens=4096, max_concurrency=1)
    return Placing(
        WeighedModel(config, index),
        inventory,
        workload,
        places_of(inventory),
        ["bf16"] * len(nodes),
        kv_bytes=0,
    )


def chunk_s(cost: ModelCost, speed: Speed, position: int, count: int) -> float:
    return prefill_layer_s(
        cost, 0, speed, tokens=count, context_tokens=chunk_context(position, count)
    )


def test_a_prompt_on_one_device_takes_its_chunks_one_after_another() -> None:
    place = placing(50.0, step_overhead_s=0.002)
    cost, speed = place.cost(0), place.speed(0)
    layers = len(cost.expert_bytes)
    chunks = [(0, 512), (512, 512), (1024, 76)]
    each = [0.002 + layers * chunk_s(cost, speed, *chunk) for chunk in chunks]
    back_s = hop_s(TOKEN_ID_BYTES, place.link(0, 0))
    told_s = sum(each) + output_s(cost, speed, tokens=1) + back_s
    assert place.prefill_s([0], [layers], 1100) == pytest.approx(told_s)


def test_chunks_of_a_prompt_overlap_on_several_devices() -> None:
    place = placing(50.0, 50.0)
    cost, speed = place.cost(0), place.speed(0)
    layers = len(cost.expert_bytes)
    half = layers // 2
    first, second = (half * chunk_s(cost, speed, at, 512) for at in (0, 512))
    hop = hop_s(512 * cost.hidden_bytes, place.link(0, 1))
    end_s = output_s(cost, speed, tokens=1) + hop_s(TOKEN_ID_BYTES, place.link(1, 0))
    # The second chunk is longer: it has more keys to see.
    assert place.prefill_s([0, 1], [half, layers], 1024) == pytest.approx(
        first + second + hop + second + end_s
    )
    alone = place.prefill_s([0], [layers], 1024)
    assert place.prefill_s([0, 1], [half, layers], 1024) < alone
