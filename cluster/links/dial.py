"""The way to the neighbour after us in the ring: connected, and its secret proved."""

import socket
import time

from ...errors import StageLostError
from .handshake import Membership, introduce
from .link import TcpLink

_RETRY_S = 0.05


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
