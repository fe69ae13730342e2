"""Noticing that a client has hung up while its answer is being made."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from .errors import ApiError

_T = TypeVar("_T")


class ClientLeft(Exception):
    """The client is gone; there is nobody to answer."""


def stopping() -> ApiError:
    """What a client is told when the server ends its request."""
    return ApiError(503, "The server is stopping.", code="stopping", retry_after_s=5)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return once the client has hung up; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ClientLeft: the client hung up first.
        ApiError: 503, the server has drained long enough.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    except asyncio.CancelledError:
        main = asyncio.current_task()
        assert main is not None
        main.uncancel()
        raise stopping() from None
    finally:
        # Waited for, so that the engine has let go of the request when the handler ends.
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
