"""Who gets a link and who is turned away, over real sockets on loopback."""

import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from magnetar.cluster.links.dial import dial
from magnetar.cluster.links.frame import (
    Frame,
)
from magnetar.cluster.links.handshake import HANDSHAKE_S, Membership, introduce, welcome
from magnetar.cluster.links.link import TcpLink
from magnetar.cluster.links.listener import LinkListener
from magnetar.errors import StageLostError

SECRET = b"k" * 32


def listener(*, epoch: int = 1, secret: bytes = SECRET) -> LinkListener:
    return LinkListener(host="127.0.0.1", secret=secret, deployment="d", epoch=epoch)


def dial_it(address: str, *, epoch: int = 1, secret: bytes = SECRET, name: str = "d") -> TcpLink:
    return dial(address, secret=secret, deployment=name, epoch=epoch, timeout_s=2.0)


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
