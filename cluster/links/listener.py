"""Where the neighbour before us in the ring, or the stage of a helper, arrives."""

import contextlib
import logging
import queue
import socket
import threading
import time

from ...errors import StageLostError
from .handshake import HANDSHAKE_S, Membership, welcome
from .link import TcpLink

logger = logging.getLogger(__name__)

_MAX_GREETED = 16
"""Handshakes at once; strangers beyond that are not even asked."""
_MAX_READY = 4
_RETRY_S = 0.05


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


def _join_address(name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
