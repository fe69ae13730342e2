"""The loop of a stage, between real links."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from magnetar.cluster.links.frame import Frame
from magnetar.cluster.links.link import TcpLink
from magnetar.errors import StageLostError
from magnetar.serve.engine import stage_worker
from magnetar.serve.engine.stage_worker import Executor, StageWorker
from magnetar.serve.engine.step import SamplingParams, StepPlan, StepResult, StepRow
from magnetar.serve.engine.step_codec import (
    decode_error,
    decode_result,
    decode_traffic,
    encode_error,
    encode_plan,
    encode_traffic,
)
from magnetar.tests.fake_stage import FakeStage, linked_pair, next_token

TIMEOUT_S = 20.0


@contextmanager
def running_worker(stage: Executor) -> Iterator[tuple[TcpLink, StageWorker, TcpLink]]:
    """A worker named stage 1, with the far ends of its links."""
    before, upstream = linked_pair()
    downstream, after = linked_pair()
    worker = StageWorker(stage, upstream=upstream, downstream=downstream, name="stage 1")
    worker.start()
    try:
        yield before, worker, after
    finally:
        worker.stop()
        before.close()
        after.close()


def fake_stage(*, is_first: bool = True, is_last: bool = True) -> FakeStage:
    return FakeStage(num_kv_blocks=4, is_first=is_first, is_last=is_last)


def step_frame(step_id: int, token_id: int = 7) -> Frame:
    """The first token of a request of its own."""
    row = StepRow(
        request_id=step_id,
        position=0,
        token_ids=(token_id,),
        new_block_ids=(step_id % 4,),
        sampling=SamplingParams(),
    )
    plan = StepPlan(step_id=step_id, rows=(row,))
    return Frame(kind="step", epoch=0, step_id=step_id, body=encode_plan(plan))


class GatedStage:
    """Computes nothing until the gate opens."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()

    def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> StepResult:
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        return StepResult(step_id=plan.step_id, samples=())


def test_a_middle_stage_passes_the_plan_on_with_its_hidden_states() -> None:
    with running_worker(fake_stage(is_last=False)) as (before, _, after):
        sent = step_frame(3)
        before.send(sent)
        frame = after.receive(TIMEOUT_S)
    assert (frame.kind, frame.step_id, frame.body) == ("step", 3, sent.body)
    assert frame.tensor is not None
    assert frame.tensor.tolist() == [[7.0]]


def test_the_last_stage_answers_with_samples() -> None:
    with running_worker(fake_stage()) as (before, _, after):
        before.send(step_frame(3))
        frame = after.receive(TIMEOUT_S)
    assert (frame.kind, frame.tensor) == ("result", None)
    (sample,) = decode_result(3, frame.body).samples
    assert sample.token_id == next_token([7])


def test_steps_are_received_while_one_is_computed_and_keep_their_order() -> None:
    stage = GatedStage()
    with running_worker(stage) as (before, _, after):
        for step_id in range(30):
            before.send(step_frame(step_id))
        assert stage.entered.wait(TIMEOUT_S)
        stage.gate.set()
        assert [after.receive(TIMEOUT_S).step_id for _ in range(30)] == list(range(30))


def test_a_long_step_keeps_nobody_from_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_worker, "_LONG_STEP_S", 0.01)
    stage = GatedStage()
    with running_worker(stage) as (before, _, after):
        before.send(step_frame(0))
        assert stage.entered.wait(TIMEOUT_S)
        for step_id in range(1, 20):  # 80 MB: far more than the kernel holds
            hidden_TD = torch.zeros(512, 2048)
            before.send(replace(step_frame(step_id), tensor=hidden_TD))
        stage.gate.set()
        assert [after.receive(TIMEOUT_S).step_id for _ in range(20)] == list(range(20))
        for step_id in range(20, 40):  # short ones again
            before.send(step_frame(step_id))
            assert after.receive(TIMEOUT_S).step_id == step_id


def test_steps_that_are_now_long_and_now_short_keep_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So short that whoever receives changes all the time.
    monkeypatch.setattr(stage_worker, "_LONG_STEP_S", 1e-4)
    num_steps = 400
    with running_worker(fake_stage(is_last=False)) as (before, _, after), ThreadPoolExecutor() as p:

        def send() -> None:
            for step_id in range(num_steps):
                before.send(step_frame(step_id))

        sent = p.submit(send)
        got = [after.receive(TIMEOUT_S).step_id for _ in range(num_steps)]
        assert got == list(range(num_steps))
        sent.result()


def test_large_and_small_frames_leave_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_worker, "_AT_ONCE_BYTES", 1000)

    class Wide:
        def step(self, plan: StepPlan, hidden_TD: torch.Tensor | None) -> torch.Tensor:
            return torch.zeros(1, 1 if plan.step_id % 3 else 1 << 20)

    with running_worker(Wide()) as (before, _, after):
        for step_id in range(30):
            before.send(step_frame(step_id))
        assert [after.receive(TIMEOUT_S).step_id for _ in range(30)] == list(range(30))


def test_the_end_of_a_neighbour_is_told_in_the_middle_of_a_long_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_worker, "_LONG_STEP_S", 0.01)
    stage = GatedStage()
    with running_worker(stage) as (before, _, after):
        before.send(step_frame(0))
        assert stage.entered.wait(TIMEOUT_S)
        before.close()
        assert "closed the link" in decode_error(after.receive(TIMEOUT_S).body)
        stage.gate.set()


def test_an_exception_travels_to_the_engine_and_ends_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = fake_stage()
    stage.fail_at_step = 1
    with running_worker(stage) as (before, worker, after):
        for step_id in range(3):
            before.send(step_frame(step_id))
        assert after.receive(TIMEOUT_S).kind == "result"
        frame = after.receive(TIMEOUT_S)
        assert frame.kind == "error"
        assert "stage 1 failed at step 1: ValueError" in decode_error(frame.body)
        with pytest.raises(StageLostError, match="told to fail"):
            worker.wait(TIMEOUT_S)
        assert not worker.is_alive()
        with pytest.raises(StageLostError):
            before.receive(TIMEOUT_S)
    assert "Traceback" in caplog.text


def test_the_error_of_a_stage_before_passes_through() -> None:
    with running_worker(fake_stage()) as (before, worker, after):
        before.send(Frame(kind="error", epoch=0, step_id=0, body=encode_error("stage 0 burns")))
        assert decode_error(after.receive(TIMEOUT_S).body) == "stage 0 burns"
        with pytest.raises(StageLostError, match="stage 0 burns"):
            worker.wait(TIMEOUT_S)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (Frame(kind="step", epoch=0, step_id=0, body=b"[]"), "has no place"),
        (Frame(kind="result", epoch=0, step_id=0), "sent a result to a stage"),
    ],
)
def test_what_is_no_step_ends_the_worker(frame: Frame, words: str) -> None:
    with running_worker(fake_stage()) as (before, _, after):
        before.send(frame)
        message = decode_error(after.receive(TIMEOUT_S).body)
    assert "stage 1 lost the one before it" in message
    assert words in message


def test_a_dead_neighbour_before_is_told_to_the_one_after() -> None:
    with running_worker(fake_stage()) as (before, worker, after):
        before.close()
        assert "closed the link" in decode_error(after.receive(TIMEOUT_S).body)
        with pytest.raises(StageLostError, match="stage 1 lost the one before it"):
            worker.wait(TIMEOUT_S)


def test_a_silent_neighbour_is_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_worker, "SILENCE_S", 0.05)
    with running_worker(fake_stage()) as (_, _, after):
        assert "nothing from" in decode_error(after.receive(TIMEOUT_S).body)


def test_a_dead_neighbour_after_ends_the_worker() -> None:
    with running_worker(fake_stage()) as (before, worker, after):
        after.close()

        def send_until_lost() -> None:
            # The kernel takes the first frame; its answer tells that nobody is there.
            for step_id in range(1000):
                with contextlib.suppress(StageLostError):
                    before.send(step_frame(step_id))
                worker.wait(0.01)

        with pytest.raises(StageLostError, match="stage 1 lost the one after it"):
            send_until_lost()
        with pytest.raises(StageLostError):
            before.receive(TIMEOUT_S)


def test_a_worker_says_that_it_lives_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_worker, "ALIVE_S", 0.01)
    stage = GatedStage()
    with running_worker(stage) as (before, _, after):
        before.send(step_frame(0))
        assert stage.entered.wait(TIMEOUT_S)
        opener = threading.Timer(0.6, stage.gate.set)
        opener.start()
        # A silence of half a second would raise TimeoutError.
        assert after.receive(0.5).kind == "result"
        opener.join()


def test_traffic_of_experts_is_told_when_it_is_news_and_that_of_others_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage_worker, "ALIVE_S", 0.01)
    before, upstream = linked_pair()
    downstream, after = linked_pair()
    tokens = {4: (1, 2)}
    worker = StageWorker(
        fake_stage(), upstream=upstream, downstream=downstream, expert_tokens=lambda: dict(tokens)
    )
    worker.start()
    try:
        told = after.receive(TIMEOUT_S)
        assert (told.kind, decode_traffic(told.body)) == ("traffic", {4: (1, 2)})
        before.send(Frame(kind="traffic", epoch=0, step_id=0, body=encode_traffic({3: (5, 5)})))
        before.send(step_frame(1))
        frames = [after.receive(TIMEOUT_S) for _ in range(2)]
        assert sorted(frame.kind for frame in frames) == ["result", "traffic"]
        (passed,) = (frame for frame in frames if frame.kind == "traffic")
        assert decode_traffic(passed.body) == {3: (5, 5)}
        tokens[4] = (2, 2)
        assert decode_traffic(after.receive(TIMEOUT_S).body) == {4: (2, 2)}
    finally:
        worker.stop()
        before.close()
        after.close()


def test_stopping_leaves_no_thread_and_no_error() -> None:
    before_threads = set(threading.enumerate())
    with running_worker(fake_stage()) as (_, worker, _):
        assert not worker.wait(0.01)
        assert worker.is_alive()
        worker.stop()
        worker.stop()
        assert worker.wait(TIMEOUT_S)
    assert set(threading.enumerate()) == before_threads
