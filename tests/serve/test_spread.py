"""Experts on several hosts give what one host gives."""

import contextlib
import threading
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.cluster.links.frame import Frame
from magnetar.errors import StageLostError
from magnetar.fetcher.config import ModelConfig
from magnetar.serve.engine import helper_link
from magnetar.serve.engine.helper import Helper
from magnetar.serve.engine.helper_link import HelperLink, decode_request, encode_request
from magnetar.serve.engine.helper_worker import HelperWorker
from magnetar.serve.model.loader import load_experts, load_transformer
from magnetar.serve.model.moe import MoeLayer
from magnetar.serve.model.spread import HeldExperts, SpreadExperts
from magnetar.tests.fake_stage import linked_pair
from magnetar.tests.helper_process import helper_process
from magnetar.tests.stages import MemorySource, Pipeline, random_tensors

CONFIG = ModelConfig(
    dim=64,
    n_layers=2,
    head_dim=16,
    hidden_dim=96,
    n_heads=4,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=128,
    rope_theta=1e4,
    max_context_tokens=256,
    num_experts=8,
    num_experts_per_tok=2,
)
SOURCE = MemorySource(random_tensors(CONFIG))
TIMEOUT_S = 20.0
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}


class NearExperts:
    """`RemoteExperts` without a distance; remembers what it was sent."""

    def __init__(self, layers: Mapping[int, HeldExperts]) -> None:
        self.layers = layers
        self.asked: list[tuple[int, int, tuple[int, ...]]] = []
        self._outputs: list[torch.Tensor] = []

    def send(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> None:
        self.asked.append((layer_id, len(x_RC), tuple(experts_A)))
        self._outputs.append(self.layers[layer_id].outputs(x_RC, rows_A, experts_A))

    def receive(self) -> torch.Tensor:
        return self._outputs.pop()


def held(layer: int, ids: Sequence[int]) -> HeldExperts:
    layers, _ = load_experts(CONFIG, SOURCE, {layer: ids}, dtype="fp32", device=torch.device("cpu"))
    return layers[layer]


def whole_layer() -> MoeLayer:
    transformer, _ = load_transformer(
        CONFIG,
        SOURCE,
        first_layer=0,
        end_layer=1,
        has_embeddings=False,
        has_output=False,
        dtype="fp32",
        device=torch.device("cpu"),
    )
    layer = transformer.layers[0].feed_forward
    assert isinstance(layer, MoeLayer)
    return layer


WHOLE = whole_layer()


@settings(max_examples=60)
@given(
    num_tokens=st.integers(1, 120),
    hosts=st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=8, max_size=8),
    seed=st.integers(0, 100),
)
def test_any_placement_gives_the_outputs_of_one_host(
    num_tokens: int, hosts: list[set[int]], seed: int
) -> None:
    ids = [[expert for expert in range(8) if host in hosts[expert]] for host in range(3)]
    helpers = [NearExperts({0: held(0, ids[host])}) for host in (1, 2)]
    experts = SpreadExperts(0, num_experts=8, held=held(0, ids[0]))
    experts.join([(helper, ids[host]) for helper, host in zip(helpers, (1, 2), strict=True)])
    x = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(seed))
    layer = MoeLayer(CONFIG, gate=WHOLE.gate, experts=experts)
    torch.testing.assert_close(layer.forward(x), WHOLE.forward(x), atol=1e-4, rtol=1e-4)


def test_a_row_travels_once_however_many_of_its_experts_are_there() -> None:
    helper = NearExperts({0: held(0, range(4, 8))})
    experts = SpreadExperts(0, num_experts=8, held=held(0, range(4)))
    experts.join([(helper, range(4, 8))])
    x = torch.randn(3, 64)
    experts.forward(x, torch.tensor([[4, 5], [0, 1], [2, 7]]))
    assert helper.asked == [(0, 2, (4, 5, 7))]


def test_an_expert_on_no_host_is_refused() -> None:
    experts = SpreadExperts(0, num_experts=8, held=held(0, range(4)))
    with pytest.raises(ValueError, match=r"\[4, 5\] of layer 0"):
        experts.join([(NearExperts({}), (6, 7))])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_stage_with_a_helper_process_gives_the_logits_of_one_node(dtype: str) -> None:
    here, there = {0: (0, 1, 2), 1: (3, 5)}, {0: (3, 4, 5, 6, 7), 1: (0, 1, 2, 4, 6, 7)}
    alone = Pipeline(CONFIG, SOURCE, dtype=dtype)
    split = Pipeline(CONFIG, SOURCE, dtype=dtype, held_experts=here)
    with helper_process(CONFIG, there, dtype=dtype) as (_, helper):
        split.stages[0].join_helpers([(helper, there)])
        prompts = [list(range(3, 40)), [7]]
        for _ in range(3):
            logits = [
                pipeline.logits(*[pipeline.row(n, prompt) for n, prompt in enumerate(prompts)])
                for pipeline in (alone, split)
            ]
            bound = TOLERANCE[dtype] * float(logits[0].std())
            torch.testing.assert_close(logits[1], logits[0], atol=bound, rtol=1e-4)
            prompts = [[int(row.argmax())] for row in logits[0]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int4"])
def test_in_reproducible_mode_a_helper_process_changes_no_bit(dtype: str) -> None:
    here, there = {0: (0, 1, 2), 1: range(8)}, {0: (3, 4, 5, 6, 7), 1: (0, 5, 6)}
    alone = Pipeline(CONFIG, SOURCE, dtype=dtype, batch_invariant=True)
    split = Pipeline(CONFIG, SOURCE, dtype=dtype, batch_invariant=True, held_experts=here)
    with helper_process(CONFIG, there, dtype=dtype, batch_invariant=True) as (_, helper):
        split.stages[0].join_helpers([(helper, there)])
        prompts = [list(range(3, 90)), [7], [8, 9]]
        for _ in range(3):
            logits = [
                pipeline.logits(*[pipeline.row(n, prompt) for n, prompt in enumerate(prompts)])
                for pipeline in (alone, split)
            ]
            assert torch.equal(logits[0], logits[1])
            prompts = [[int(row.argmax())] for row in logits[0]]


def test_a_helper_that_dies_is_lost_with_its_name() -> None:
    there = {0: (4, 5, 6, 7), 1: (4, 5, 6, 7)}
    split = Pipeline(CONFIG, SOURCE, held_experts={0: range(4), 1: range(4)})
    with helper_process(CONFIG, there, dtype="fp32") as (process, helper):
        split.stages[0].join_helpers([(helper, there)])
        split.logits(split.row(0, range(3, 20)))
        process.kill()
        process.wait()
        with pytest.raises(StageLostError, match="helper h2 of stage 0 is lost"):
            split.logits(split.row(1, range(3, 20)))


def test_a_helper_that_fails_says_why_and_ends() -> None:
    near, far = linked_pair()
    worker = HelperWorker(FailingHelper(), link=far, name="helper 1")
    worker.start()
    with contextlib.closing(HelperLink(near, name="helper 1")) as link:
        link.send(0, torch.zeros(1, 64), [0], [3])
        with pytest.raises(StageLostError, match=r"helper 1 failed: .*no more"):
            link.receive()
        with pytest.raises(StageLostError, match=r"helper 1: .*no more"):
            worker.wait(TIMEOUT_S)
    worker.stop()


class FailingHelper:
    def outputs(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> torch.Tensor:
        raise RuntimeError("no more")


def test_a_helper_that_computes_for_long_says_that_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("magnetar.serve.engine.helper_worker.ALIVE_S", 0.01)
    near, far = linked_pair()
    slow = SlowHelper()
    send_alive = far.send_alive

    def send_and_go_on() -> None:
        send_alive()
        slow.gate.set()

    monkeypatch.setattr(far, "send_alive", send_and_go_on)
    worker = HelperWorker(slow, link=far, name="helper 1")
    worker.start()
    with contextlib.closing(HelperLink(near, name="helper 1")) as link:
        link.send(0, torch.zeros(1, 64), [0], [3])
        assert link.receive().shape == (1, 64)
    worker.stop()


class SlowHelper:
    def __init__(self) -> None:
        self.gate = threading.Event()

    def outputs(
        self, layer_id: int, x_RC: torch.Tensor, rows_A: Sequence[int], experts_A: Sequence[int]
    ) -> torch.Tensor:
        assert self.gate.wait(TIMEOUT_S)
        return x_RC


def test_a_helper_that_is_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_link, "SILENCE_S", 0.1)
    near, far = linked_pair()
    with contextlib.closing(far), contextlib.closing(HelperLink(near, name="helper 1")) as link:
        link.send(0, torch.zeros(1, 64), [0], [3])
        with pytest.raises(StageLostError, match=r"helper 1: nothing from .* for 0\.1 s"):
            link.receive()


def test_an_answer_to_another_question_is_refused() -> None:
    near, far = linked_pair()
    with contextlib.closing(far), contextlib.closing(HelperLink(near, name="helper 1")) as link:
        link.send(0, torch.zeros(1, 64), [0], [3])
        far.send(Frame(kind="outputs", epoch=far.epoch, step_id=1, tensor=torch.zeros(2, 64)))
        with pytest.raises(StageLostError, match="what was not asked"):
            link.receive()


@given(
    layer=st.integers(0, 100),
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=50),
)
def test_requests_survive_the_link(layer: int, asked: list[tuple[int, int]]) -> None:
    rows, experts = zip(*asked, strict=True)
    assert decode_request(encode_request(layer, rows, experts), num_rows=10) == (
        layer,
        rows,
        experts,
    )
    with pytest.raises(ValueError, match="row"):
        decode_request(encode_request(layer, rows, experts), num_rows=max(rows))


@pytest.mark.parametrize("body", [b"", b"\0" * 4, b"\0" * 11, b"\0" * 16])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="is none"):
        decode_request(body, num_rows=1)


def test_a_helper_reads_its_own_experts_alone() -> None:
    source = MemorySource(random_tensors(CONFIG))
    helper = Helper.load(
        config=CONFIG, source=source, experts={1: (2,)}, dtype="fp32", device="cpu"
    )
    prefix = "layers.1.feed_forward.experts.2"
    assert set(source.names_read) == {f"{prefix}.{part}.weight" for part in ("w1", "w2", "w3")}
    assert helper.loaded_bytes == 3 * 64 * 96 * 4
    with pytest.raises(KeyError):
        helper.outputs(0, torch.zeros(1, 64), [0], [2])
