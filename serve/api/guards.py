"""Who may ask: whoever has the key, or where there is none, programs of this machine."""

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""Everything else needs the key, where there is one."""


class KeyGuard:
    """Lets through what carries ``Authorization: Bearer KEY``, and the probes."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._digest = _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            # Digests have one length and are compared in constant time.
            given = _digest(key.strip().encode("latin-1"))  # the bytes that were sent
            known = hmac.compare_digest(given, self._digest)
            if scheme.lower() != "bearer" or not known:
                error = ApiError(
                    401,
                    "The API key is missing or wrong; send the header Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LoopbackGuard:
    """Keeps web pages away from a server on loopback, which has no key to stop them.

    A page whose name was pointed at 127.0.0.1 (DNS rebinding) sends its own name as Host; a page
    that posts here without asking sends its own Origin.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            origin = headers.get("origin")
            if not _is_loopback_name(_host_name(host)):
                error = ApiError(
                    403,
                    f"The host {host[:200]!r} is not this machine; ask localhost or 127.0.0.1.",
                    code="host_not_allowed",
                )
            elif origin is not None and urlsplit(origin).netloc != host:
                error = ApiError(
                    403,
                    f"Web pages of {origin[:200]!r} may not use this server.",
                    code="origin_not_allowed",
                )
            else:
                await self._app(scope, receive, send)
                return
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback_name(name: str) -> bool:
    return name in ("localhost", "::1") or name.endswith(".localhost") or _is_127(name)


def _is_127(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 4 and parts[0] == "127" and all(p.isdecimal() for p in parts)
