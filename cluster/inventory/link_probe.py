"""What lies between two nodes: round trip and bandwidth of the links that stages talk over."""

import secrets
import threading
import time
from typing import Final

from ...errors import StageLostError
from ..links.dial import dial
from ..links.frame import Frame
from ..links.link import TcpLink
from ..links.listener import LinkListener
from ..machines import Link
from .pieces import timed_pieces, undisturbed_s

PAUSE_S: Final = 0.01
"""Between two messages, as between two steps: who waits for long wakes late."""
BULK_S: Final = 0.3
"""How long data is sent to find the bandwidth."""
_BULK_VALUES: Final = 1 << 19
"""Of fp16: 1 MiB a frame."""
_DEPLOYMENT: Final = "link-probe"
_TIMEOUT_S: Final = 10.0


class Echo:
    """Answers the probes of other nodes until it is closed; has a thread of its own."""

    def __init__(self, *, host: str, secret: bytes) -> None:
        """Listen on `host`; only who knows `secret` is answered."""
        self._listener = LinkListener(host=host, secret=secret, deployment=_DEPLOYMENT, epoch=1)
        self.address = self._listener.address
        self._thread = threading.Thread(target=self._run, name="link-echo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                link = self._listener.accept(3600.0)
            except StageLostError:
                return
            self._answer(link)

    def _answer(self, link: TcpLink) -> None:
        try:
            while True:
                frame = link.receive(_TIMEOUT_S)
                if frame.tensor is None:  # bulk is taken in silence
                    link.send(Frame(kind="result", epoch=1, step_id=frame.step_id))
        except (StageLostError, TimeoutError):
            link.close()


def probe_link(source: str, target: str, address: str, *, secret: bytes) -> Link:
    """Measure the link from here to the `Echo` at `address`; takes about a second.

    Raises:
        StageLostError: nobody answers there.
    """
    import torch

    link = dial(address, secret=secret, deployment=_DEPLOYMENT, epoch=1, timeout_s=_TIMEOUT_S)
    try:
        rtt_s = _round_trip_s(link)
        bulk = Frame(kind="step", epoch=1, step_id=0, tensor=torch.zeros(_BULK_VALUES).half())
        link.send(bulk)
        _echo(link)
        began, num_frames = time.perf_counter(), 0
        while time.perf_counter() - began < BULK_S:
            link.send(bulk)
            num_frames += 1
        _echo(link)  # all of it has been read now
        seconds = max(time.perf_counter() - began - rtt_s, 1e-6)
    finally:
        link.close()
    gbps = num_frames * _BULK_VALUES * 2 / seconds / 1e9
    # Framing and both wake-ups are in the round trip.
    return Link(source=source, target=target, rtt_s=rtt_s, gbps=gbps, overhead_s=0.0)


def probe_itself(host: str, address: str) -> Link:
    """Measure what lies between two devices of this machine."""
    secret = secrets.token_bytes(32)
    echo = Echo(host=address, secret=secret)
    try:
        return probe_link(host, host, echo.address, secret=secret)
    finally:
        echo.close()


def loopback_s() -> float:
    """A message and its answer within this machine, as `Link.rtt_s` counts them."""
    secret = secrets.token_bytes(32)
    echo = Echo(host="127.0.0.1", secret=secret)
    try:
        link = dial(
            echo.address, secret=secret, deployment=_DEPLOYMENT, epoch=1, timeout_s=_TIMEOUT_S
        )
        try:
            return _round_trip_s(link)
        finally:
            link.close()
    finally:
        echo.close()


def _round_trip_s(link: TcpLink) -> float:
    """A message there and its answer back, after pauses such as steps make."""
    return undisturbed_s(timed_pieces(lambda: _echo(link), pause_s=PAUSE_S))


def _echo(link: TcpLink) -> None:
    link.send(Frame(kind="step", epoch=1, step_id=0))
    link.receive(_TIMEOUT_S)
