"""A uvicorn protocol that hangs up on requests that arrive too slowly, or are not HTTP.

Uvicorn itself waits for ever for a request that is dripped byte by byte (uvicorn#157), and ASGI
middleware only runs once the headers are whole.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

HEADERS_S = 10.0
BODY_S = 30.0


class DeadlineProtocol(H11Protocol):
    """Headers must be whole within `HEADERS_S` and bodies within `BODY_S`, from their first byte.

    The first headers of a connection count from its opening; idle time between requests is
    uvicorn's own keep-alive timeout.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._awaited: Any = None
        self._deadline: asyncio.TimerHandle | None = None
        self._await(h11.IDLE)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await(self.conn.their_state)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.SEND_BODY:
            self._await(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's answer to what is not HTTP, or has headers without end, in OpenAI's shape."""
        answer = ApiError(400, msg, code="invalid_http").response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        events = (
            h11.Response(status_code=400, headers=headers),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _await(self, state: Any) -> None:
        """Arm the deadline of what the client sends now; more of the same does not extend it."""
        if state is self._awaited:
            return
        self._awaited = state
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        limit_s = {h11.IDLE: HEADERS_S, h11.SEND_BODY: BODY_S}.get(state)
        if limit_s is not None:
            self._deadline = self.loop.call_later(limit_s, self.transport.abort)
