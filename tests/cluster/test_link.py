"""Links between members of a pipeline, over real sockets on loopback."""

import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magnetar.cluster.links import link as link_module
from magnetar.cluster.links.bell import Bell
from magnetar.cluster.links.frame import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    pack_alive,
    pack_header,
    parse_header,
)
from magnetar.cluster.links.handshake import HANDSHAKE_S, Membership, introduce, welcome
from magnetar.cluster.links.link import Frame, LinkListener, TcpLink, dial
from magnetar.errors import StageLostError
from magnetar.tests.fake_stage import linked_pair

SECRET = b"k" * 32


def listener(*, epoch: int = 1, secret: bytes = SECRET) -> LinkListener:
    return LinkListener(host="127.0.0.1", secret=secret, deployment="d", epoch=epoch)


def dial_it(address: str, *, epoch: int = 1, secret: bytes = SECRET, name: str = "d") -> TcpLink:
    return dial(address, secret=secret, deployment=name, epoch=epoch, timeout_s=2.0)


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
    "tensor", [torch.zeros(1, 1, 1), torch.tensor(1.0), torch.zeros(2, dtype=torch.int64)]
)
def test_what_a_frame_cannot_say_is_not_sent(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a link carries no tensor of"):
        pack_header(Frame(kind="step", epoch=0, step_id=0, tensor=tensor))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"secret": b"w" * 32}, "it closed the connection"),
        ({"name": "other"}, "it closed the connection"),
        ({"epoch": 0}, "it is of epoch 1; this is epoch 0"),
        ({"epoch": 2}, "it is of epoch 1; this is epoch 2"),
    ],
)
def test_a_stranger_is_turned_away_and_the_right_peer_still_gets_in(
    wrong: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    door = listener()
    with pytest.raises(StageLostError, match=f"refused the link: {told}"):
        dial_it(door.address, **wrong)
    link = dial_it(door.address)
    door.accept(10.0).close()
    link.close()
    deadline = time.monotonic() + 10
    while "turned 127.0.0.1" not in caplog.text:  # said after the stranger heard it
        assert time.monotonic() < deadline
        time.sleep(0.001)
    door.close()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 200, b"", b"MGNH"])
def test_strangers_who_hold_the_door_do_not_keep_the_peer_out(noise: bytes) -> None:
    door = listener()
    host, _, port = door.address.rpartition(":")
    with ExitStack() as held:
        for _ in range(5):
            stranger = held.enter_context(socket.create_connection((host, int(port))))
            stranger.sendall(noise)
        link = dial_it(door.address)
        door.accept(1.0).close()
        link.close()
        # Its end does not wait for the strangers either.
        before = time.monotonic()
        door.close()
        assert time.monotonic() - before < HANDSHAKE_S


def test_a_listener_answers_before_anybody_accepts() -> None:
    """All members of a ring dial first and accept afterwards."""
    door = listener()
    link = dial_it(door.address)
    accepted = door.accept(1.0)
    link.send(Frame(kind="result", epoch=1, step_id=3))
    assert accepted.receive(5.0).step_id == 3
    for end in (link, accepted, door):
        end.close()


def test_a_listener_that_does_not_know_the_secret_is_not_trusted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor, ThreadPoolExecutor(1) as pool:
        host, port = impostor.getsockname()
        dialled = pool.submit(dial_it, f"{host}:{port}")
        sock, _ = impostor.accept()
        us = Membership(secret=b"w" * 32, deployment="d", epoch=1)
        with sock, pytest.raises(StageLostError, match="does not know the secret"):
            welcome(sock, us, deadline=time.monotonic() + 5)
        with pytest.raises(StageLostError, match="refused the link"):
            dialled.result()


def test_a_proof_cannot_be_reflected() -> None:
    """An impostor who sends our own proof back as its verdict is not believed."""
    ours, theirs = socket.socketpair()
    us = Membership(secret=SECRET, deployment="d", epoch=1)

    def reflect() -> None:
        theirs.sendall(struct.pack("<4sB32s", b"MGNH", 2, bytes(32)))
        answer = theirs.recv(77, socket.MSG_WAITALL)
        theirs.sendall(struct.pack("<BQ", 1, 1) + answer[-32:])

    with ours, theirs, ThreadPoolExecutor(1) as pool:
        reflected = pool.submit(reflect)
        with pytest.raises(StageLostError, match="does not know the secret"):
            introduce(ours, us, deadline=time.monotonic() + 5)
        reflected.result()


def test_a_handshake_one_byte_at_a_time_ends_in_time() -> None:
    ours, theirs = socket.socketpair()
    us = Membership(secret=SECRET, deployment="d", epoch=1)
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.01):
            theirs.send(b"M")

    with ours, theirs, ThreadPoolExecutor(1) as pool:
        dripping = pool.submit(drip)
        with pytest.raises(StageLostError, match="did not finish the handshake in time"):
            welcome(ours, us, deadline=time.monotonic() + 0.1)
        stop.set()
        dripping.result()


def test_nobody_there_is_said_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StageLostError, match="does not answer"):
        dial(f"127.0.0.1:{port}", secret=SECRET, deployment="d", epoch=1, timeout_s=0.2)
    door = listener()
    with pytest.raises(StageLostError, match="no neighbour dialled"):
        door.accept(0.05)
    door.close()
    with pytest.raises(StageLostError, match="was closed"):
        door.accept(1.0)


def test_closing_a_listener_leaves_no_thread_and_wakes_who_waits() -> None:
    before = set(threading.enumerate())
    door = listener()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(door.accept, 10.0)
        door.close()
        door.close()
        with pytest.raises(StageLostError, match="was closed"):
            accepted.result()
    assert set(threading.enumerate()) == before


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


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_no_bytes_crash_the_reader_of_headers(raw: bytes) -> None:
    for candidate in (raw, pack_alive(0)[:5] + raw[5:]):
        try:
            header = parse_header(candidate, epoch=0)
        except ValueError:
            continue
        assert header.body_bytes <= MAX_BODY_BYTES
