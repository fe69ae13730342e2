"""The HTTP server: a socket bound early, and uvicorn in a thread that is stopped cleanly."""

import asyncio
import errno
import ipaddress
import socket
import threading
import time
from typing import TYPE_CHECKING

from ...errors import MagnetarError, NotFoundError, PortInUseError, UsageError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_BACKLOG = 1024
_KEEP_ALIVE_S = 75
_START_TIMEOUT_S = 30.0
_STOP_MARGIN_S = 5.0
_LAST_WORDS_S = 2.0


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int, *, has_api_key: bool = False) -> socket.socket:
    """A socket bound to `host` and `port` (0: a free one).

    It does not listen before `Server.start`: until then clients are refused, not kept waiting.

    Raises:
        UsageError: an address that others can reach, without a key; or no valid port.
        PortInUseError: somebody listens there.
        NotFoundError: the host is not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"The port {port} does not exist; give one of 1 to 65535, or 0.")
    if not is_loopback(host) and not has_api_key:
        raise UsageError(
            f"{host} can be reached by others and there is no API key; give --api-key-file FILE"
            " (apiKeyFile in a manifest), or listen on 127.0.0.1."
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise NotFoundError(f"The host {host!r} is unknown ({error}); give an address.") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A server that was just stopped leaves connections behind that would block its port.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise _port_in_use(host, port) from error
        if error.errno == errno.EACCES:
            raise UsageError(
                f"Port {port} needs privileges; give one above 1023 with --port."
            ) from error
        raise NotFoundError(f"Cannot listen on {host}:{port} ({error.strerror}).") from error
    return bound


def _port_in_use(host: str, port: int) -> PortInUseError:
    return PortInUseError(
        f"Port {port} on {host} is in use; give another with --port, or --port 0 for a free one."
    )


class Server:
    """Serves `app` on `bound` from a thread of its own."""

    def __init__(self, app: "ASGIApp", bound: socket.socket) -> None:
        import uvicorn

        from .slow_request_guard import DeadlineProtocol

        host, port = bound.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.url = f"http://{self.address}"
        self._bound = bound
        started = self._started = threading.Event()

        class _Uvicorn(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                started.set()

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                await super().shutdown(sockets=sockets)
                # Uvicorn has cancelled what is left but does not wait for the last words.
                state = self.server_state
                deadline = time.monotonic() + _LAST_WORDS_S
                while (state.tasks or state.connections) and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)
                for connection in list(state.connections):
                    connection.transport.abort()

        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=DeadlineProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                backlog=_BACKLOG,
            )
        )
        self._thread = threading.Thread(target=self._run, name="magnetar-http", daemon=True)
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Return once requests are accepted.

        Raises:
            PortInUseError: somebody else began to listen since `bind`.
            MagnetarError: it did not come up.
        """
        try:
            self._bound.listen(_BACKLOG)
        except OSError as error:
            host, port = self._bound.getsockname()[:2]
            raise _port_in_use(host, port) from error
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S) or self._failure is not None:
            raise MagnetarError(
                f"The HTTP server on {self.address} did not start ({self._failure}); see the log."
            ) from self._failure

    def stop(self, drain_s: float = 30.0) -> None:
        """Accept nothing more, let running answers end for `drain_s`, then end them with an error.

        May be called twice, and without `start`.
        """
        if not self._thread.is_alive():
            self._bound.close()
            return
        # Uvicorn reads it when it shuts down, and any number of seconds is fine there.
        self._uvicorn.config.timeout_graceful_shutdown = drain_s  # type: ignore[assignment]
        self._uvicorn.should_exit = True
        self._thread.join(drain_s + _STOP_MARGIN_S)
        if self._thread.is_alive():
            raise MagnetarError(f"The HTTP server on {self.address} did not stop; see the log.")

    def _run(self) -> None:
        try:
            self._uvicorn.run(sockets=[self._bound])
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._started.set()
