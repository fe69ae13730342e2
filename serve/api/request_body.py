"""Reading a request's body, but not more of it than we want."""

from starlette.requests import ClientDisconnect, Request

from .disconnect import ClientLeft
from .errors import ApiError

MAX_BODY_BYTES = 2 * 2**20
"""A prompt of 32k tokens is about 150 KB of JSON."""


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 as soon as it is clear that the body is too large.
        ClientLeft: the client hung up, or was hung up on for being too slow.
    """
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise _too_large(int(announced))
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > MAX_BODY_BYTES:
                raise _too_large(num_bytes)
            parts.append(part)
    except ClientDisconnect:
        raise ClientLeft from None
    return b"".join(parts)


def _too_large(num_bytes: int) -> ApiError:
    return ApiError(
        413,
        f"The body has {num_bytes} bytes or more; at most {MAX_BODY_BYTES} are read.",
        code="body_too_large",
        headers={"Connection": "close"},
    )
