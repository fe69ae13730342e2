"""A stream of server-sent events that notices a client that leaves, stalls or waits long."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .disconnect import ClientLeft, stopping, wait_for_disconnect
from .errors import ApiError, api_error_of

HEARTBEAT_S = 15.0
"""A comment goes out when nothing else did for so long; proxies cut silent connections."""
WRITE_STALL_S = 30.0
"""A client that does not read for so long has left."""


def encode_event(body: dict[str, Any]) -> bytes:
    """One ``data:`` event."""
    return b"data: %b\n\n" % json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


class EventStream(Response):
    """Sends each body of `events` as an event, then ``[DONE]``.

    The answer's status waits for the first event (or heartbeat), so that an error before it is a
    plain error answer; a later error is an event of its own, and the last one. `events` is closed
    in any case: that is how a client that leaves ends its request.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._started = False
        self._over = False
        self._client_left = False
        self._last_write_s = 0.0
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        main = asyncio.current_task()
        assert main is not None

        def leave(watch: asyncio.Task[None]) -> None:
            if not watch.cancelled() and not self._over:
                self._client_left = True
                main.cancel()

        watch = asyncio.create_task(wait_for_disconnect(receive))
        watch.add_done_callback(leave)
        heartbeat = asyncio.create_task(self._beat(send))
        failure: Exception | None = None
        try:
            try:
                async for body in self._events:
                    await self._write(send, encode_event(body))
            except asyncio.CancelledError:
                main.uncancel()
                if self._client_left:
                    return
                # The server has drained long enough. Say so instead of just hanging up.
                failure = stopping()
            except Exception as error:
                failure = error
            heartbeat.cancel()
            if isinstance(failure, ClientLeft):
                return
            if failure is None or self._started:
                await self._finish(send, api_error_of(failure) if failure is not None else None)
            else:
                await api_error_of(failure).response()(scope, receive, send)
        except ClientLeft:
            return
        finally:
            self._over = True
            watch.cancel()
            heartbeat.cancel()
            await self._events.aclose()

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(WRITE_STALL_S):
                if not self._started:
                    self._started = True
                    await send(
                        {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                    )
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientLeft from None
        self._last_write_s = asyncio.get_running_loop().time()

    async def _finish(self, send: Send, error: ApiError | None) -> None:
        last = encode_event(error.body) if error is not None else b""
        await self._write(send, last + b"data: [DONE]\n\n", more=False)

    async def _beat(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last_write_s = loop.time()
        while True:
            idle_s = loop.time() - self._last_write_s
            if idle_s >= HEARTBEAT_S:
                try:
                    await self._write(send, b": still working\n\n")
                except ClientLeft:
                    return  # the next event finds out too
                idle_s = 0.0
            await asyncio.sleep(HEARTBEAT_S - idle_s)
