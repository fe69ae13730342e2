"""Links between members of a pipeline, over real sockets on loopback."""

import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

from magnetar.cluster.links import link as link_module
from magnetar.cluster.links.bell import Bell
from magnetar.cluster.links.frame import Frame, pack_header
from magnetar.cluster.links.link import TcpLink
from magnetar.errors import StageLostError
from magnetar.tests.fake_stage import linked_pair


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (4,)])
def test_frames_arrive_as_they_were_sent(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sender, receiver = linked_pair()
    tensor = torch.randn(shape).to(dtype)
    sender.send(Frame(kind="step", epoch=0, step_id=2**40, body=b"plan", tensor=tensor))
    frame = receiver.receive(5.0)
    assert (frame.kind, frame.step_id, frame.body) == ("step", 2**40, b"plan")
    assert frame.tensor is not None
    assert frame.tensor.dtype == dtype
    assert torch.equal(frame.tensor, tensor)
    sender.close()
    receiver.close()


def test_a_large_frame_and_many_small_ones_keep_their_order() -> None:
    sender, receiver = linked_pair()
    big = torch.arange(512 * 4096, dtype=torch.float32).view(512, 4096)

    def send() -> None:
        sender.send(Frame(kind="step", epoch=0, step_id=0, tensor=big))
        for step_id in range(1, 200):
            sender.send(Frame(kind="result", epoch=0, step_id=step_id))

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        first = receiver.receive(5.0)
        assert first.tensor is not None
        assert torch.equal(first.tensor, big)
        assert [receiver.receive(5.0).step_id for _ in range(199)] == list(range(1, 200))
        sent.result()
    sender.close()
    receiver.close()


def test_waiting_in_vain_leaves_the_link_intact() -> None:
    sender, receiver = linked_pair()
    with pytest.raises(TimeoutError):
        receiver.receive(0.01)
    sender.send(Frame(kind="error", epoch=0, step_id=1, body=b"x"))
    assert receiver.receive(5.0).body == b"x"
    sender.close()
    receiver.close()


def test_a_closed_peer_is_noticed() -> None:
    sender, receiver = linked_pair()
    sender.close()
    with pytest.raises(StageLostError, match="closed the link"):
        receiver.receive(5.0)
    receiver.close()


def test_closing_wakes_a_thread_that_waits() -> None:
    sender, receiver = linked_pair()
    failed = threading.Event()

    def receive() -> None:
        with pytest.raises(StageLostError):
            receiver.receive()
        failed.set()

    thread = threading.Thread(target=receive)
    thread.start()
    receiver.close()
    thread.join(5.0)
    assert failed.is_set()
    sender.close()


def test_signs_of_life_are_sound_but_no_frames() -> None:
    sender, receiver = linked_pair()
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receiver.receive, 0.3)
        for _ in range(10):  # longer than the receiver's patience
            sender.send_alive()
            assert not wait([received], timeout=0.05).done
        sender.send(Frame(kind="error", epoch=0, step_id=1, body=b"x"))
        assert received.result().body == b"x"
    sender.close()
    receiver.close()


def test_who_waits_for_a_frame_hears_the_bell_too() -> None:
    (sender, receiver), bell = linked_pair(), Bell()
    bell.ring()
    bell.ring()
    assert not receiver.wait(60.0, bell)
    assert not receiver.wait(0.0, bell), "all rings are one"
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(receiver.wait, 60.0, bell)
        bell.ring()
        assert not waits.result(5.0)
    sender.send(Frame(kind="error", epoch=0, step_id=1, body=b"x"))
    bell.ring()
    assert receiver.wait(60.0, bell)
    assert receiver.receive(5.0).body == b"x"
    for end in (sender, receiver, bell):
        end.close()
    bell.ring()  # nobody hears it


def test_who_waits_for_a_frame_gets_it_behind_signs_of_life() -> None:
    (sender, receiver), bell = linked_pair(), Bell()
    sender.send_alive()
    assert not receiver.wait(60.0, bell)
    sender.send(Frame(kind="result", epoch=0, step_id=1))
    sender.send_alive()
    sender.send(Frame(kind="result", epoch=0, step_id=2))
    for step_id in (1, 2):
        while not receiver.wait(60.0, bell):
            pass  # the sign of life came by itself
        assert receiver.receive(5.0).step_id == step_id
    sender.close()
    with pytest.raises(StageLostError, match="closed the link"):
        receiver.wait(60.0, bell)
    receiver.close()
    bell.close()


def test_who_waits_for_a_frame_gives_a_silent_peer_up(monkeypatch: pytest.MonkeyPatch) -> None:
    (sender, receiver), bell = linked_pair(), Bell()
    assert not receiver.wait(0.0, bell)
    monkeypatch.setattr(link_module, "SILENCE_S", 0.0)
    with pytest.raises(TimeoutError, match="nothing from"):
        receiver.wait(0.001, bell)
    sender.send_alive()
    assert not receiver.wait(60.0, bell)
    sender.close()
    receiver.close()
    bell.close()


def test_a_peer_that_stops_within_a_frame_is_lost() -> None:
    ours, theirs = socket.socketpair()
    link = TcpLink(ours, epoch=0, peer="stage 1")
    theirs.sendall(pack_header(Frame(kind="step", epoch=0, step_id=1, body=b"plan")) + b"pl")
    with pytest.raises(StageLostError, match="stage 1 stopped in the middle of a frame"):
        link.receive(0.05)
    link.close()
    theirs.close()


def test_tensors_made_for_inference_and_views_are_sent() -> None:
    sender, receiver = linked_pair()
    with torch.inference_mode():
        tensor = torch.arange(12, dtype=torch.bfloat16).view(3, 4).t()
    sender.send(Frame(kind="step", epoch=0, step_id=0, tensor=tensor))
    received = receiver.receive(5.0).tensor
    assert received is not None
    assert torch.equal(received, tensor)
    sender.close()
    receiver.close()


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, b"XXXX", "sent no frame"),
        (4, b"\x09", "sent no frame"),
        (5, b"\x09", "sent no frame"),
        (6, b"\x09", "unknown dtype"),
        (6, b"\xff", "contradicts itself"),
        (7, b"\x00", "contradicts itself"),
        (7, b"\x03", "contradicts itself"),
        (8, struct.pack("<Q", 9), "of epoch 9; this is epoch 0"),
        (24, struct.pack("<II", 2**31, 2**31), "announces a tensor of"),
        (32, struct.pack("<I", 2**31), "announces a body of"),
    ],
)
def test_a_malformed_frame_is_refused_before_memory_is_taken(
    position: int, value: bytes, words: str
) -> None:
    ours, theirs = socket.socketpair()
    link = TcpLink(ours, epoch=0, peer="stage 1")
    header = bytearray(
        pack_header(Frame(kind="step", epoch=0, step_id=1, tensor=torch.zeros(1, 1)))
    )
    header[position : position + len(value)] = value
    theirs.sendall(header)
    with pytest.raises(StageLostError, match=f"stage 1 .*{words}"):
        link.receive(5.0)
    link.close()
    theirs.close()
