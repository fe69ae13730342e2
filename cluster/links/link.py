"""Direct TCP links between the members of a pipeline: frames of a header, a body and a tensor.

Nothing on a link is ever unpickled, and lengths are checked before memory is taken. Ray carries
none of this: an echo of 16 KiB took 0.05 to 0.17 ms on a raw socket and 1.3 to 3.1 ms through an
actor call (2 cores, loopback).
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import struct
import time
from typing import TYPE_CHECKING, Final, Protocol

from ...errors import StageLostError
from .bell import Bell
from .frame import HEADER_BYTES, Frame, Header, pack_alive, pack_header, parse_header

if TYPE_CHECKING:
    import torch

ALIVE_S: Final = 2.0
"""Who has sent nothing for so long says that it lives."""
SILENCE_S: Final = 30.0
"""Who is silent for so long is lost: frozen, or behind a broken network, which TCP cannot tell."""

_DEAD_PEER_MS = 20_000
"""How long sent bytes may stay unacknowledged before the kernel gives a peer up."""
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
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
