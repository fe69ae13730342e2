"""Links between members of a pipeline, over real sockets on loopback."""

import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from magnetar.cluster.link import Frame, LinkListener, TcpLink, dial
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

    def wait() -> None:
        with pytest.raises(StageLostError):
            receiver.receive()
        failed.set()

    thread = threading.Thread(target=wait)
    thread.start()
    receiver.close()
    thread.join(5.0)
    assert failed.is_set()
    sender.close()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"secret": b"w" * 32}, "refused the link"),
        ({"name": "other"}, "refused the link"),
        ({"epoch": 0}, "refused the link"),
    ],
)
def test_a_stranger_is_turned_away_and_the_right_peer_still_gets_in(
    wrong: dict[str, object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    door = listener()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(door.accept, 10.0)
        with pytest.raises(StageLostError, match=words):
            dial_it(door.address, **wrong)  # type: ignore[arg-type]
        link = dial_it(door.address)
        accepted.result().close()
    link.close()
    door.close()
    assert "turned 127.0.0.1" in caplog.text


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n" + b"x" * 200, b""])
def test_garbage_at_the_door_does_not_keep_the_peer_out(garbage: bytes) -> None:
    door = listener()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(door.accept, 10.0)
        host, _, port = door.address.rpartition(":")
        with socket.create_connection((host, int(port))) as noise:
            noise.sendall(garbage)
        link = dial_it(door.address)
        accepted.result().close()
    link.close()
    door.close()


def test_a_listener_that_does_not_know_the_secret_is_not_trusted() -> None:
    door = listener(secret=b"w" * 32)
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(door.accept, 1.0)
        with pytest.raises(StageLostError):
            dial_it(door.address)
        with pytest.raises(StageLostError, match="no neighbour dialled"):
            accepted.result()
    door.close()


def test_nobody_there_is_said_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StageLostError, match="does not answer"):
        dial(f"127.0.0.1:{port}", secret=SECRET, deployment="d", epoch=1, timeout_s=0.2)


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, b"XXXX", "sent no frame"),
        (4, b"\x09", "sent no frame"),
        (5, b"\x09", "sent no frame"),
        (6, b"\x09", "unknown dtype"),
        (8, struct.pack("<Q", 9), "is of epoch 9"),
        (24, struct.pack("<II", 2**31, 2**31), "announces a tensor"),
        (32, struct.pack("<I", 2**31), "announces a body"),
    ],
)
def test_a_malformed_frame_is_refused_before_memory_is_taken(
    position: int, value: bytes, words: str
) -> None:
    left, right = socket.socketpair()
    header = bytearray(struct.pack("<4sBBBBQQIII", b"MGNT", 1, 0, 2, 2, 0, 1, 1, 1, 0))
    header[position : position + len(value)] = value
    left.sendall(bytes(header) + bytes(4))
    link = object.__new__(TcpLink)
    link._socket, link._epoch, link._peer = right, 0, "peer"
    with pytest.raises(StageLostError, match=words):
        link.receive(5.0)
    left.close()
    right.close()
