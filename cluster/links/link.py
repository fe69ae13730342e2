"""Direct TCP links between the members of a pipeline: frames of a header, a body and a tensor.

Nothing on a link is ever unpickled, and lengths are checked before memory is taken. Ray carries
none of this: an echo of 16 KiB took 0.05 to 0.17 ms on a raw socket and 1.3 to 3.1 ms through an
actor call (2 cores, loopback).
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol

from ...errors import StageLostError
from .bell import Bell
from .frame import HEADER_BYTES, Frame, Header, pack_alive, pack_header, parse_header
from .handshake import HANDSHAKE_S, Membership, introduce, welcome

if TYPE_CHECKING:
    import torch

__all__ = ["ALIVE_S", "SILENCE_S", "Frame", "LinkListener", "StageLink", "TcpLink", "dial"]

logger = logging.getLogger(__name__)

ALIVE_S: Final = 2.0
"""Who has sent nothing for so long says that it lives."""
SILENCE_S: Final = 30.0
"""Who is silent for so long is lost: frozen, or behind a broken network, which TCP cannot tell."""

_DEAD_PEER_MS = 20_000
"""How long sent bytes may stay unacknowledged before the kernel gives a peer up."""
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
_MAX_GREETED = 16
"""Handshakes at once; strangers beyond that are not even asked."""
_MAX_READY = 4
_RETRY_S = 0.05
_AHEAD_BYTES = 64 << 10
"""What is read at once: a whole step of a few rows, where three reads took 60 us longer."""


class StageLink(Protocol):
    """One end of an ordered stream of frames. One thread sends; one thread receives."""

    @property
    def epoch(self) -> int:
        """The incarnation whose frames the link carries."""
        ...

    def send(self, frame: Frame) -> None:
        """Send a frame; blocks while the peer does not read.

        Raises:
            StageLostError: the peer is gone.
        """
        ...

    def send_alive(self) -> None:
        """Tell the peer that we live; raises as `send`."""
        ...

    def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame; signs of life count as sound but are not returned.

        Raises:
            TimeoutError: nothing came for `timeout_s`; the link is as good as before.
            StageLostError: the peer is gone, or sent what is no frame of this epoch.
        """
        ...

    def wait(self, timeout_s: float, bell: Bell) -> bool:
        """Wait for a frame to `receive`; False when `timeout_s` passes, or sooner at the bell.

        Also sooner at a sign of life. What has rung is hushed.

        Raises:
            TimeoutError: not even a sign of life came for `SILENCE_S`.
            StageLostError: the peer is gone.
        """
        ...

    def close(self) -> None:
        """End both directions; wakes a thread that waits in `receive` or `send`."""
        ...


class TcpLink:
    """A `StageLink` over a connected socket whose handshake is over; the link owns the socket."""

    def __init__(self, sock: socket.socket, *, epoch: int, peer: str) -> None:
        """`peer` names the other end in errors."""
        self.peer = peer
        self._socket = sock
        self._epoch = epoch
        self._timeout_s: float | None = None
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._rest = self._ahead[:0]
        """What was read ahead and is not taken yet."""
        self._alive = pack_alive(epoch)
        self._heard_at = math.inf
        """When a `wait` last read something; the first of them, before any has."""
        sock.settimeout(None)
        if sock.family != socket.AF_UNIX:
            _tune(sock)

    @property
    def epoch(self) -> int:
        """See `StageLink.epoch`."""
        return self._epoch

    def send(self, frame: Frame) -> None:
        """See `StageLink.send`; ValueError for a frame of another epoch, or one too large."""
        if frame.epoch != self._epoch:
            raise ValueError(f"a frame of epoch {frame.epoch} on a link of {self._epoch}")
        head = pack_header(frame) + frame.body
        if frame.tensor is None or not frame.tensor.numel():
            self._send_all(memoryview(head))
            return
        tail = _bytes_of(frame.tensor.contiguous())
        try:
            sent = self._socket.sendmsg([head, tail])
        except OSError as error:
            raise self._gone(error) from error
        if sent < len(head):
            self._send_all(memoryview(head)[sent:])
            sent = len(head)
        if sent < len(head) + len(tail):
            self._send_all(tail[sent - len(head) :])

    def send_alive(self) -> None:
        """See `StageLink.send_alive`."""
        self._send_all(memoryview(self._alive))

    def receive(self, timeout_s: float | None = None) -> Frame:
        """See `StageLink.receive`."""
        self._set_timeout(timeout_s)
        while True:
            raw = self._take(HEADER_BYTES, may_time_out=True)
            try:
                header = parse_header(raw, epoch=self._epoch)
            except ValueError as error:
                raise StageLostError(f"{self.peer} {error}") from None
            if header.kind != "alive":
                break
        body = bytes(self._take(header.body_bytes))
        tensor = None
        if header.dtype is not None:
            tensor = _tensor_of(self._take(header.tensor_bytes), header)
        return Frame(
            kind=header.kind, epoch=header.epoch, step_id=header.step_id, body=body, tensor=tensor
        )

    def wait(self, timeout_s: float, bell: Bell) -> bool:
        """See `StageLink.wait`."""
        self._skip_alive()
        if self._rest:
            return True
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(bell, select.POLLIN)
        ready = [descriptor for descriptor, _ in poller.poll(timeout_s * 1e3)]
        now = time.monotonic()
        if self._socket.fileno() in ready:
            self._heard_at = now
            self._rest = self._ahead[: self._read(self._ahead, may_time_out=False)]
            self._skip_alive()
        self._heard_at = min(self._heard_at, now)
        if now - self._heard_at > SILENCE_S:
            raise TimeoutError(f"nothing from {self.peer}")
        if bell.fileno() in ready:
            bell.hush()
        return bool(self._rest)

    def close(self) -> None:
        """See `StageLink.close`."""
        with contextlib.suppress(OSError):  # the peer was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send_all(self, data: memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def _take(self, num_bytes: int, *, may_time_out: bool = False) -> bytearray:
        """The next bytes: few by way of what is read ahead, many straight into their place."""
        if num_bytes <= len(self._rest):
            taken = bytearray(self._rest[:num_bytes])
            self._rest = self._rest[num_bytes:]
            return taken
        taken = bytearray(num_bytes)
        view = memoryview(taken)
        while view:
            if self._rest:
                count = min(len(view), len(self._rest))
                view[:count] = self._rest[:count]
                self._rest = self._rest[count:]
            else:
                may_wait = may_time_out and len(view) == num_bytes
                if len(view) < _AHEAD_BYTES:
                    self._rest = self._ahead[: self._read(self._ahead, may_time_out=may_wait)]
                    continue
                count = self._read(view, may_time_out=may_wait)
            view = view[count:]
        return taken

    def _skip_alive(self) -> None:
        """Drop the signs of life that were read ahead, up to a frame."""
        while self._rest[:HEADER_BYTES] == self._alive:
            self._rest = self._rest[HEADER_BYTES:]

    def _read(self, into: memoryview, *, may_time_out: bool) -> int:
        """Wait for bytes, and take those that are there."""
        try:
            count = self._socket.recv_into(into)
        except BlockingIOError:  # what a receive timeout of the kernel looks like
            if may_time_out:
                raise TimeoutError(f"nothing from {self.peer}") from None
            raise StageLostError(f"{self.peer} stopped in the middle of a frame") from None
        except OSError as error:
            raise self._gone(error) from error
        if count == 0:
            raise StageLostError(f"{self.peer} closed the link")
        return count

    def _set_timeout(self, timeout_s: float | None) -> None:
        """The kernel's own: Python's would make a poll of every receive and apply to sends too."""
        if timeout_s == self._timeout_s:
            return
        micros = 0 if timeout_s is None else max(1, round(timeout_s * 1e6))
        timeval = struct.pack("@ll", *divmod(micros, 1_000_000))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        except OSError as error:
            raise self._gone(error) from error
        self._timeout_s = timeout_s

    def _gone(self, error: OSError) -> StageLostError:
        return StageLostError(f"{self.peer} is gone: {error.strerror or error}")


class LinkListener:
    """Waits for the neighbour before us in the ring.

    Handshakes run in threads of their own from the first moment, so that a stranger who says
    nothing delays nobody, and a neighbour that dials before we accept is answered.
    """

    def __init__(self, *, host: str, secret: bytes, deployment: str, epoch: int) -> None:
        self._us = Membership(secret=secret, deployment=deployment, epoch=epoch)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family)
        self._ready: queue.Queue[TcpLink | None] = queue.Queue()  # held to _MAX_READY below
        self._lock = threading.Lock()
        self._greeted: dict[threading.Thread, socket.socket] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="link-listen", daemon=True)
        self._address = _join_address(self._socket.getsockname())
        self._thread.start()

    @property
    def address(self) -> str:
        """``HOST:PORT`` to dial."""
        return self._address

    def accept(self, timeout_s: float) -> TcpLink:
        """The next peer that knows the secret; others are turned away and said in the log.

        Raises:
            StageLostError: none came in time, or the listener was closed.
        """
        try:
            link = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise StageLostError(
                f"no neighbour dialled {self.address} within {timeout_s:g} s; is a firewall "
                "between the nodes?"
            ) from None
        if link is None:
            self._ready.put(None)
            raise StageLostError(f"the listener of {self._us.deployment} was closed")
        return link

    def close(self) -> None:
        """Stop listening; links that were accepted stay."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        self._thread.join()
        with self._lock:
            greeted = dict(self._greeted)
        for thread, sock in greeted.items():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()
        while not self._ready.empty():
            if link := self._ready.get():
                link.close()
        self._ready.put(None)

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                # Closed, or a passing shortage of file descriptors: neither ends the listener.
                if not self._closed.wait(_RETRY_S):
                    logger.warning("cannot accept on %s: %s", self.address, error)
                continue
            with self._lock:
                if len(self._greeted) >= _MAX_GREETED:
                    sock.close()
                    continue
                thread = threading.Thread(
                    target=self._greet,
                    args=(sock, _join_address(address)),
                    name="link-greet",
                    daemon=True,
                )
                self._greeted[thread] = sock
                thread.start()

    def _greet(self, sock: socket.socket, peer: str) -> None:
        try:
            sock.settimeout(HANDSHAKE_S)
            welcome(sock, self._us, deadline=time.monotonic() + HANDSHAKE_S)
            link = TcpLink(sock, epoch=self._us.epoch, peer=peer)
        except (OSError, StageLostError) as error:
            if not self._closed.is_set():
                logger.warning("turned %s away: %s", peer, error)
            sock.close()
        else:
            with self._lock:
                has_room = self._ready.qsize() < _MAX_READY
                if has_room:
                    self._ready.put(link)
            if not has_room:
                logger.warning("turned %s away: enough neighbours wait already", peer)
                link.close()
        finally:
            with self._lock:
                del self._greeted[threading.current_thread()]


def dial(address: str, *, secret: bytes, deployment: str, epoch: int, timeout_s: float) -> TcpLink:
    """Connect to the neighbour after us, trying again while nobody listens.

    Raises:
        StageLostError: it does not answer in time, does not know the secret, or is of another
            epoch.
    """
    us = Membership(secret=secret, deployment=deployment, epoch=epoch)
    deadline = time.monotonic() + timeout_s
    sock = _connect(address, deadline)
    try:
        introduce(sock, us, deadline=max(deadline, time.monotonic() + 0.1))
        return TcpLink(sock, epoch=epoch, peer=address)
    except (OSError, StageLostError) as error:
        sock.close()
        raise StageLostError(f"{address} refused the link: {error}") from error


def _connect(address: str, deadline: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    while True:
        left_s = max(deadline - time.monotonic(), 0.1)
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=left_s)
        except OSError as error:
            if time.monotonic() + _RETRY_S >= deadline:
                raise StageLostError(f"{address} does not answer: {error}") from error
            time.sleep(_RETRY_S)


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (*_KEEPALIVE, ("TCP_USER_TIMEOUT", _DEAD_PEER_MS)):
        if hasattr(socket, name):  # some are Linux's alone
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor: numpy has no bf16, so as bytes."""
    import torch

    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def _tensor_of(taken: bytearray, header: Header) -> torch.Tensor:
    """The tensor that a frame brought, in the memory where it was received."""
    import torch

    assert header.dtype is not None
    dtype = getattr(torch, header.dtype)
    if not taken:
        return torch.empty(header.shape, dtype=dtype)
    return torch.frombuffer(taken, dtype=dtype).view(header.shape)


def _join_address(name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
