"""A stream of server-sent events that notices a client that leaves, stalls or waits long."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from pydantic_core import to_json
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
    return b"data: %b\n\n" % to_json(body)


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
        self._is_writing = False
        self._touched_s = 0.0
        """When the last write began or ended."""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        main = asyncio.current_task()
        assert main is not None

        def leave() -> None:
            if not self._over:
                self._client_left = True
                main.cancel()

        watch = asyncio.create_task(wait_for_disconnect(receive))
        watch.add_done_callback(lambda watch: None if watch.cancelled() else leave())
        heartbeat = asyncio.create_task(self._beat(send, leave))
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
        except TimeoutError:
            return  # nobody reads the last words
        finally:
            self._over = True
            watch.cancel()
            heartbeat.cancel()
            await self._events.aclose()

    async def _write(self, send: Send, data: bytes, *, more: bool = True) -> None:
        """Waits for a client that does not read; `_beat` knows for how long."""
        clock = asyncio.get_running_loop().time
        self._is_writing, self._touched_s = True, clock()
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._is_writing, self._touched_s = False, clock()

    async def _finish(self, send: Send, error: ApiError | None) -> None:
        last = encode_event(error.body) if error is not None else b""
        async with asyncio.timeout(WRITE_STALL_S):
            await self._write(send, last + b"data: [DONE]\n\n", more=False)

    async def _beat(self, send: Send, leave: Callable[[], None]) -> None:
        """A timer for the whole stream: one for every write took a tenth of all the time."""
        loop = asyncio.get_running_loop()
        self._touched_s = loop.time()
        while True:
            idle_s = loop.time() - self._touched_s
            limit_s = WRITE_STALL_S if self._is_writing else HEARTBEAT_S
            if idle_s < limit_s:
                await asyncio.sleep(limit_s - idle_s)
            elif self._is_writing:
                leave()
                return
            else:
                try:
                    async with asyncio.timeout(WRITE_STALL_S):
                        await self._write(send, b": still working\n\n")
                except TimeoutError:
                    leave()
                    return
